// Panels of one-byte and four-bit weights over tiles of AMX. No include guard: after amx_tiling.h.
//
// A form says how weights widen to what a tile wants: kPairs of k a step, kSteps a block of a tile,
// and `widen`, which puts `count` steps of a panel and block down, rows `stride` bytes apart.

template <class Tiles>
struct Int8Form {
  static constexpr bool kScaled = true;
  static constexpr int64_t kPairs = 2;
  static constexpr int64_t kSteps = kBlockPairs / kPairs;

  REMORA_INLINE void widen(const uint8_t* weights, int64_t step_bytes, int64_t block, int panel,
                           int64_t count, char* to, int64_t stride) {
    const uint8_t* from = weights + block * kSteps * step_bytes + panel * kLineBytes;
#pragma GCC unroll 8
    for (int64_t step = 0; step < count; ++step) {
      Tiles::widen_bytes(from + step * step_bytes, to + step * kPairs * stride, stride);
    }
  }
};

template <class Tiles>
struct Int4Form {
  static constexpr bool kScaled = false;
  static constexpr int64_t kPairs = 4;
  static constexpr int64_t kSteps = kBlockPairs / kPairs;
  static constexpr int64_t kTileBlocks = kInt4BlockSteps / kSteps;  // that share scales

  REMORA_INLINE void widen(const uint8_t* weights, int64_t step_bytes, int64_t block, int panel,
                           int64_t count, char* to, int64_t stride) {
    const uint8_t* line = weights + block / kTileBlocks * (kLineBytes + kInt4BlockSteps * step_bytes);
    const auto scales = Tiles::int4_scales(line + panel * kPanel);
    const uint8_t* from =
        line + kLineBytes + block % kTileBlocks * kSteps * step_bytes + panel * kLineBytes;
#pragma GCC unroll 4
    for (int64_t step = 0; step < count; ++step) {
      Tiles::widen_nibbles(from + step * step_bytes, scales, to + step * kPairs * stride, stride);
    }
  }
};

// Widened a block ahead of their use into memory that stays in the first cache.
template <class Form>
struct NarrowWeights {
  static constexpr bool kScaled = Form::kScaled;
  const uint8_t* weights;
  int64_t step_bytes;
  int64_t num_steps;
  Ahead ahead;
  alignas(64) char wide[2][kGroupPanels][kBlockPairs * kBlockBytes];

  REMORA_TARGET void take(const PanelCall& call) {
    weights = static_cast<const uint8_t*>(call.weights);
    step_bytes = call.num_panels * kLineBytes;
    num_steps = call.num_steps;
  }
  REMORA_TARGET void prepare(int64_t block, int panel) {
    char* to = wide[block % 2][panel];
    const int64_t left = num_steps - block * Form::kSteps;
    if (left >= Form::kSteps) {
      Form::widen(weights, step_bytes, block, panel, Form::kSteps, to, kBlockBytes);
    } else if (left > 0) {
      Form::widen(weights, step_bytes, block, panel, left, to, kBlockBytes);
      const int64_t done = left * Form::kPairs * kBlockBytes;
      std::memset(to + done, 0, sizeof wide[0][0] - done);
    }
  }
  template <class Tiles, int kTile>
  REMORA_TARGET void load(Tiles& tiles, int64_t block, int panel) const {
    tiles.template load<kTile>(wide[block % 2][panel], kBlockBytes);
  }
};

// Rows times narrow weights: widened block by block for one pass over them, else once for all.
template <class Tiles, class Form>
REMORA_TARGET void panel_narrow(const PanelCall& call) {
  const int64_t row_bytes = call.num_steps * Form::kPairs * kPairBytes;
  if (call.num_rows <= 2 * kTileRows) {
    panel_rows<Tiles, NarrowWeights<Form>>(call, row_bytes);
    return;
  }
  const int64_t step_bytes = call.num_panels * kLineBytes;
  const int64_t stride = call.num_panels * kBlockBytes;
  PanelCall plain = call;
  plain.num_steps = Form::kPairs * call.num_steps;
  plain.weight_bytes = plain.num_steps * stride;
  plain.next = nullptr;
  static thread_local Buffer wide;
  char* to = wide.take(plain.weight_bytes);
  if (to == nullptr) throw std::bad_alloc();
  plain.weights = to;
  const char* from = static_cast<const char*>(call.weights);
  const int64_t first = std::min(call.weight_bytes, kAheadBytes);
  Ahead ahead{from + first, from + call.weight_bytes, static_cast<const char*>(call.next), true};
  for (int64_t block = 0; block * Form::kSteps < call.num_steps; ++block) {
    const int64_t count = std::min(Form::kSteps, call.num_steps - block * Form::kSteps);
    for (int panel = 0; panel < call.num_panels; ++panel) {
      Form::widen(static_cast<const uint8_t*>(call.weights), step_bytes, block, panel, count,
                  to + block * kBlockPairs * stride + panel * kBlockBytes, stride);
      ahead.ask(Form::kSteps);
    }
  }
  panel_rows<Tiles, PlainWeights<Form::kScaled>>(plain, row_bytes);
}
