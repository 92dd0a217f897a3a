// The tiling of bfloat16 panels over tiles of AMX, shared by the instructions and their emulation. No
// include guard: each includes it once, inside its own namespace, with REMORA_TARGET defined.
//
// A tile is 16 rows of 64 bytes. Weights lie as a tile wants them: 16 pairs of k, one below the
// other, times 16 columns. One multiplication adds, for each row and column, the products of the even
// k in ascending order, those of the odd k likewise, the two, and that to the sum: 32 k a block. The
// order is the same for every row of a tile and for tiles of every height, so a row's result does not
// depend on the others; heights follow the rows, since one of few rows multiplies sooner.
//
// Up to 16 rows: one tile of rows, sums of four panels (tiles 0..3; rows 4; weights 5, 6, 7 in turn).
// More: two tiles of rows times two panels (sums 0..3; rows 4, 5; weights 6, 7), which loads as much as
// it multiplies. (Three tiles of rows times one panel were slower than two and one: 1.18 times at 40.)
//
// `Tiles` provides configure(rows of the first tile of rows, of the second or 0), zero, load, store,
// multiply<sum, rows, weights>, end.

constexpr int kTileRows = 16;
constexpr int64_t kBlockBytes = 64;  // of a row: 32 k
constexpr int64_t kBlockPairs = 16;  // of k
constexpr int64_t kPairBytes = 4;
constexpr uintptr_t kPageBytes = 4096;
constexpr int64_t kPageStartLines = 8;
constexpr int64_t kRunBlocks = 16;   // of k that 32 rows go through at once: 32 KiB of them

// The rows of one pass. A last block that is not whole is copied, zero padded.
struct TileRows {
  const char* first;
  int64_t stride;
  int64_t num_whole;
  alignas(64) char tail[2 * kTileRows][kBlockBytes];

  REMORA_TARGET void take(const PanelCall& call, int64_t row, int64_t row_bytes, int count) {
    const int64_t size = sizeof(uint16_t);
    stride = call.x_stride * size;
    first = static_cast<const char*>(call.x) + row * stride;
    num_whole = row_bytes / kBlockBytes;
    const int64_t left = row_bytes % kBlockBytes;
    if (left == 0) return;
    for (int r = 0; r < count; ++r) {
      std::memcpy(tail[r], first + r * stride + num_whole * kBlockBytes, left);
      std::memset(tail[r] + left, 0, kBlockBytes - left);
    }
  }

  template <class Tiles, int kTile>
  REMORA_TARGET void load(Tiles& tiles, int64_t block, int row) const {
    if (block < num_whole) {
      tiles.template load<kTile>(first + row * stride + block * kBlockBytes, stride);
    } else {
      tiles.template load<kTile>(tail[row], kBlockBytes);
    }
  }
};

// Asks for memory in pieces, in the order in which it will be read: up to `end`, then from `next` on.
struct Ahead {
  const char* at;
  const char* end;
  const char* next;
  bool soon;  // read soon: into the first cache, not the second

  // The processor's own prefetcher follows a stream within a page, after a few of its lines: those
  // are asked for a page ahead, and it has the rest there in time (64 rows of *small*'s experts from
  // memory: 13.5 -> 11.5 microseconds a group; 4 lines 12.4, 12 lines 11.6).
  REMORA_TARGET void ask_next_page() const {
    for (int64_t line = 0; line < kPageStartLines; ++line) {
      __builtin_prefetch(at + kPageBytes + line * 64, 0, 2);
    }
  }

  REMORA_TARGET void ask(int64_t num_lines) {
    for (int64_t i = 0; i < num_lines; ++i) {
      if (at == end) {
        at = next;
        end = nullptr;
      }
      if (at == nullptr) return;
      if (soon) {
        __builtin_prefetch(at, 0, 3);
      } else {
        if (reinterpret_cast<uintptr_t>(at) % kPageBytes == 0) ask_next_page();
        __builtin_prefetch(at, 0, 2);
      }
      at += 64;
    }
  }
};

// bfloat16 weights, where they lie. `prepare` is called for each panel of the block before.
template <bool kHasScale>
struct PlainWeights {
  static constexpr bool kScaled = kHasScale;
  const char* weights;
  int64_t stride;  // of one pair of k, in bytes
  int64_t num_whole;
  Ahead ahead;
  alignas(64) char tail[kBlockPairs][kGroupPanels * kBlockBytes];

  REMORA_TARGET void take(const PanelCall& call) {
    weights = static_cast<const char*>(call.weights);
    stride = call.num_panels * kBlockBytes;
    num_whole = call.num_steps / kBlockPairs;
    const int64_t left = call.num_steps % kBlockPairs;
    if (left != 0) {
      std::memcpy(tail, weights + num_whole * kBlockPairs * stride, left * stride);
      std::memset(&tail[0][0] + left * stride, 0, (kBlockPairs - left) * stride);
    }
  }
  REMORA_TARGET void prepare(int64_t, int) {}
  template <class Tiles, int kTile>
  REMORA_TARGET void load(Tiles& tiles, int64_t block, int panel) const {
    const char* from = block < num_whole ? weights + block * kBlockPairs * stride : tail[0];
    tiles.template load<kTile>(from + panel * kBlockBytes, stride);
  }
};

// One tile of rows times kPanels panels.
template <class Tiles, class Weights, int kPanels>
REMORA_TARGET void pass_one(Tiles& tiles, const TileRows& x, Weights& w, int64_t num_blocks,
                            int64_t lines) {
#pragma GCC unroll 4
  for (int p = 0; p < kPanels; ++p) w.prepare(0, p);
  tiles.template zero<0>();
  if constexpr (kPanels > 1) tiles.template zero<1>();
  if constexpr (kPanels > 2) tiles.template zero<2>();
  if constexpr (kPanels > 3) tiles.template zero<3>();
  for (int64_t block = 0; block < num_blocks; ++block) {
    x.load<Tiles, 4>(tiles, block, 0);
    w.template load<Tiles, 5>(tiles, block, 0);
    tiles.template multiply<0, 4, 5>();
    w.prepare(block + 1, 0);
    w.ahead.ask(lines);
    if constexpr (kPanels > 1) {
      w.template load<Tiles, 6>(tiles, block, 1);
      tiles.template multiply<1, 4, 6>();
      w.prepare(block + 1, 1);
      w.ahead.ask(lines);
    }
    if constexpr (kPanels > 2) {
      w.template load<Tiles, 7>(tiles, block, 2);
      tiles.template multiply<2, 4, 7>();
      w.prepare(block + 1, 2);
      w.ahead.ask(lines);
    }
    if constexpr (kPanels > 3) {
      w.template load<Tiles, 5>(tiles, block, 3);
      tiles.template multiply<3, 4, 5>();
      w.prepare(block + 1, 3);
      w.ahead.ask(lines);
    }
  }
}

// Two tiles of rows times kPanels panels, the first of them `panel`, over the blocks from `begin` to
// `end`: added to `sums`, which is where the panel's first column is.
template <class Tiles, class Weights, int kPanels>
REMORA_TARGET void pass_two(Tiles& tiles, const TileRows& x, Weights& w, int64_t begin, int64_t end,
                            int64_t lines, int panel, float* sums) {
  constexpr int64_t kStride = kGroup * sizeof(float);
  float* const second = sums + kTileRows * kGroup;
  if (begin == 0) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) w.prepare(0, panel + p);
    tiles.template zero<0>();
    tiles.template zero<2>();
    if constexpr (kPanels > 1) {
      tiles.template zero<1>();
      tiles.template zero<3>();
    }
  } else {
    tiles.template load<0>(sums, kStride);
    tiles.template load<2>(second, kStride);
    if constexpr (kPanels > 1) {
      tiles.template load<1>(sums + kPanel, kStride);
      tiles.template load<3>(second + kPanel, kStride);
    }
  }
  for (int64_t block = begin; block < end; ++block) {
    x.load<Tiles, 4>(tiles, block, 0);
    w.template load<Tiles, 6>(tiles, block, panel);
    tiles.template multiply<0, 4, 6>();
    w.prepare(block + 1, panel);
    x.load<Tiles, 5>(tiles, block, kTileRows);
    tiles.template multiply<2, 5, 6>();
    w.ahead.ask(lines);
    if constexpr (kPanels > 1) {
      w.template load<Tiles, 7>(tiles, block, panel + 1);
      tiles.template multiply<1, 4, 7>();
      w.prepare(block + 1, panel + 1);
      tiles.template multiply<3, 5, 7>();
      w.ahead.ask(lines);
    }
  }
  tiles.template store<0>(sums, kStride);
  tiles.template store<2>(second, kStride);
  if constexpr (kPanels > 1) {
    tiles.template store<1>(sums + kPanel, kStride);
    tiles.template store<3>(second + kPanel, kStride);
  }
}

// Sums [count, kGroup] of the call's rows from `row` on: scale, bias, one rounding.
template <class Weights>
REMORA_TARGET void finish(const PanelCall& call, const float (*sums)[kGroup], int64_t row, int count) {
  const uint16_t* bias = static_cast<const uint16_t*>(call.bias);
  for (int r = 0; r < count; ++r) {
    uint16_t* out = call.out_rows != nullptr
                        ? static_cast<uint16_t*>(call.out_rows[row + r]) + call.out_column
                        : static_cast<uint16_t*>(call.out) + (row + r) * call.out_stride;
    finish_row(sums[r], Weights::kScaled ? call.scale : nullptr, bias, call.num_columns, out);
  }
}

template <class Tiles, class Weights>
REMORA_TARGET void rows_one(Tiles& tiles, const PanelCall& call, const TileRows& x, Weights& w,
                            int64_t num_blocks, int64_t lines, float (*sums)[kGroup]) {
  constexpr int64_t kStride = kGroup * sizeof(float);
  switch (call.num_panels) {
    case 4: pass_one<Tiles, Weights, 4>(tiles, x, w, num_blocks, lines); break;
    case 3: pass_one<Tiles, Weights, 3>(tiles, x, w, num_blocks, lines); break;
    case 2: pass_one<Tiles, Weights, 2>(tiles, x, w, num_blocks, lines); break;
    default: pass_one<Tiles, Weights, 1>(tiles, x, w, num_blocks, lines); break;
  }
  tiles.template store<0>(sums[0], kStride);
  if (call.num_panels > 1) tiles.template store<1>(sums[0] + kPanel, kStride);
  if (call.num_panels > 2) tiles.template store<2>(sums[0] + 2 * kPanel, kStride);
  if (call.num_panels > 3) tiles.template store<3>(sums[0] + 3 * kPanel, kStride);
}

// The sums of one run of k are put down for the next: what two tiles of rows hold of a run stays in
// the first cache while all panels go by, and adding to a sum later changes no bit of it.
template <class Tiles, class Weights>
REMORA_TARGET void rows_two(Tiles& tiles, const PanelCall& call, const TileRows& x, Weights& w,
                            int64_t num_blocks, int64_t lines, float (*sums)[kGroup]) {
  for (int64_t begin = 0; begin < num_blocks; begin += kRunBlocks) {
    const int64_t end = std::min(num_blocks, begin + kRunBlocks);
    int panel = 0;
    for (; panel + 1 < call.num_panels; panel += 2) {
      pass_two<Tiles, Weights, 2>(tiles, x, w, begin, end, lines, panel, sums[0] + panel * kPanel);
    }
    if (panel < call.num_panels) {
      pass_two<Tiles, Weights, 1>(tiles, x, w, begin, end, lines, panel, sums[0] + panel * kPanel);
    }
  }
}

// What is read from memory is read by the first rows. Few rows wait for it, so it is asked for a
// little ahead; many rows compute longer than that, and ask for the next group all the while.
template <class Weights>
REMORA_TARGET int64_t ask_ahead(const PanelCall& call, Weights& w, int64_t num_pairs,
                                int64_t num_blocks) {
  const char* weights = static_cast<const char*>(call.weights);
  const int64_t size = call.weight_bytes;
  const char* next = static_cast<const char*>(call.next);
  const int64_t num_asks = std::max<int64_t>(1, num_pairs * num_blocks * call.num_panels);
  if (call.num_rows <= kTileRows) {
    const int64_t first = std::min(size, kAheadBytes);
    w.ahead = {weights + first, weights + size, next, true};
  } else {
    w.ahead = {next, next == nullptr ? nullptr : next + size, nullptr, false};
  }
  return (size / 64 + num_asks - 1) / num_asks;
}

template <class Tiles, class Weights>
REMORA_TARGET void panel_rows(const PanelCall& call, int64_t row_bytes) {
  alignas(64) float sums[2 * kTileRows][kGroup];
  const int64_t num_blocks = (row_bytes + kBlockBytes - 1) / kBlockBytes;
  const int64_t num_pairs = (call.num_rows + 2 * kTileRows - 1) / (2 * kTileRows);
  Tiles tiles;
  Weights w;
  TileRows x;
  w.take(call);
  const int64_t lines = ask_ahead(call, w, num_pairs, num_blocks);
  for (int64_t row = 0; row < call.num_rows; row += 2 * kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(2 * kTileRows, call.num_rows - row));
    tiles.configure(std::min(count, kTileRows), std::max(0, count - kTileRows));
    x.take(call, row, row_bytes, count);
    if (count <= kTileRows) {
      rows_one(tiles, call, x, w, num_blocks, lines, sums);
    } else {
      rows_two(tiles, call, x, w, num_blocks, lines, sums);
    }
    finish<Weights>(call, sums, row, count);
  }
  tiles.end();
}
