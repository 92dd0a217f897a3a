// Attention of a prompt's rows on tiles of AMX (`fast` numerics), for one implementation of tiles.
//
// Included as attention_kernel.h is and after it: with REMORA_ISA 3 over the instructions, with 0 over
// tiles in plain C++, so that the tiling is tested on any machine. Pages lie as tiles want their second
// operand: a block's keys are word rows of 16 keys, its values rows of pairs of keys. Keys are loaded
// where they are; values are copied once for all rows of a unit, since a tile takes two blocks' and
// what is outside the context must be zero. Scores, weights and sums as in Dao et al.,
// FlashAttention-2 (2023): float32, weights rounded to bfloat16 for the second product.
//
// Sums run in another order than in attention_kernel.h, and where a row's maximum is taken depends on
// the unit: `exact` must not come here.

#if REMORA_ISA == 3
#define REMORA_TILE static inline __attribute__((always_inline))

// Assembly: gcc's intrinsics take a tile's number only as a literal and do not say that they read
// memory.
struct TileUnit {
  REMORA_TILE void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t heights[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  REMORA_TILE void end() { asm volatile("tilerelease" ::: "memory"); }
  template <int TILE>
  REMORA_TILE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
  }
  template <int TILE>
  REMORA_TILE void load(const void* from, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(TILE)
                 : "memory");
  }
  template <int TILE>
  REMORA_TILE void store(float* to, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(TILE)
                 : "memory");
  }
  template <int SUM, int A, int B>
  REMORA_TILE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
  }
};
#else
#define REMORA_TILE static

struct TileUnit {
  static inline thread_local uint32_t words[8][16][16];

  REMORA_TILE void begin() {}
  REMORA_TILE void end() {}
  template <int TILE>
  REMORA_TILE void zero() {
    __builtin_memset(words[TILE], 0, sizeof words[TILE]);
  }
  template <int TILE>
  REMORA_TILE void load(const void* from, int64_t stride_bytes) {
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy(words[TILE][row], (const char*)from + row * stride_bytes, 64);
  }
  template <int TILE>
  REMORA_TILE void store(float* to, int64_t stride_bytes) {
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy((char*)to + row * stride_bytes, words[TILE][row], 64);
  }
  REMORA_TILE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
  template <int SUM, int A, int B>
  REMORA_TILE void multiply() {
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 16; ++column) {
        float sum = as_float(words[SUM][row][column]);
        for (int pair = 0; pair < 16; ++pair) {
          const uint32_t a = words[A][row][pair], b = words[B][pair][column];
          sum += as_float(a << 16) * as_float(b << 16);
          sum += as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u);
        }
        words[SUM][row][column] = __builtin_bit_cast(uint32_t, sum);
      }
  }
};
#endif

// Tiles: 0..3 sums [row tile * 2 + column tile], 4 and 5 rows, 6 and 7 what they are multiplied by.
template <int R, int C>
REMORA_TILE void multiply_all() {
  TileUnit::multiply<0, 4, 6>();
  if constexpr (C > 1) TileUnit::multiply<1, 4, 7>();
  if constexpr (R > 1) TileUnit::multiply<2, 5, 6>();
  if constexpr (R > 1 && C > 1) TileUnit::multiply<3, 5, 7>();
}

template <int R, int C>
REMORA_TILE void store_all(float* to, int64_t row_floats) {
  TileUnit::store<0>(to, row_floats * 4);
  if constexpr (C > 1) TileUnit::store<1>(to + 16, row_floats * 4);
  if constexpr (R > 1) TileUnit::store<2>(to + 16 * row_floats, row_floats * 4);
  if constexpr (R > 1 && C > 1) TileUnit::store<3>(to + 16 * row_floats + 16, row_floats * 4);
}

// Keys of one softmax step, absolute as chunks are. `begin` and `end` are what is in the context,
// widened to 32 keys, from `key` on.
struct TileStep {
  int64_t key;
  int begin, end;
  const int32_t* key_blocks[TILE_STEP_KEYS / 16];  // beyond the context repeat one inside
  const int32_t* values;  // [width / 16][TILE_STEP_KEYS / 2][16]: pairs of keys, zero beyond it
};

// Finds the step's blocks and copies its values to `values`. False: a bad block.
static bool open_step(const Keys& keys, int head, int64_t key, int32_t* values, TileStep* step) {
  const Pages& pages = *keys.pages;
  const int begin = keys.low > key ? (int)(keys.low - key) : 0;
  const int end = keys.high < key + TILE_STEP_KEYS ? (int)(keys.high - key) : TILE_STEP_KEYS;
  const int32_t* value_blocks[TILE_STEP_KEYS / 16];
  *step = {key, begin / 32 * 32, (end + 31) / 32 * 32, {}, values};
  for (int b = step->begin / 16; b < step->end / 16; ++b) {
    const int inside = b < begin / 16 ? begin / 16 : b > (end - 1) / 16 ? (end - 1) / 16 : b;
    const int64_t block = keys.table[key / 16 + inside];
    if (block < 0 || block >= pages.num_blocks) return false;
    step->key_blocks[b] = pages.keys + block * pages.key_block + head * pages.key_head;
    value_blocks[b] = pages.values + block * pages.value_block + head * pages.value_head;
  }
  for (int pair = step->begin / 2; pair < step->end / 2; ++pair) {
    const bool even = 2 * pair >= begin && 2 * pair < end;
    const bool odd = 2 * pair + 1 >= begin && 2 * pair + 1 < end;
    const i32x16 seen = splat_word((even ? 0xffff : 0) | (odd ? (int32_t)0xffff0000 : 0));
    const int32_t* from = value_blocks[pair / 8] + pair % 8 * pages.width;
    for (int lane = 0; lane < pages.width; lane += 16)
      *(i32x16*)(values + (lane / 16 * (TILE_STEP_KEYS / 2) + pair) * 16) =
          load_words(from + lane) & seen;
  }
  return true;
}

// Scores of R tiles of rows against the keys of two blocks.
template <int R>
REMORA_TILE void tile_scores(const int32_t* q_RW, int64_t words, const int32_t* block,
                             const int32_t* second_block, float* score) {
  TileUnit::zero<0>(), TileUnit::zero<1>();
  if constexpr (R > 1) TileUnit::zero<2>(), TileUnit::zero<3>();
  for (int64_t w = 0; w < words; w += 16) {
    TileUnit::load<4>(q_RW + w, words * 4);
    if constexpr (R > 1) TileUnit::load<5>(q_RW + 16 * words + w, words * 4);
    TileUnit::load<6>(block + w * 16, 64);
    TileUnit::load<7>(second_block + w * 16, 64);
    multiply_all<R, 2>();
  }
  store_all<R, 2>(score, TILE_STEP_KEYS);
}

// acc += P V of R tiles of rows, for C tiles of value lanes and the keys [begin, end) of the step.
template <int R, int C>
REMORA_TILE void tile_values(const uint16_t* p, const int32_t* values, int begin, int end,
                             float* acc_RV, int64_t width) {
  TileUnit::load<0>(acc_RV, width * 4);
  if constexpr (C > 1) TileUnit::load<1>(acc_RV + 16, width * 4);
  if constexpr (R > 1) TileUnit::load<2>(acc_RV + 16 * width, width * 4);
  if constexpr (R > 1 && C > 1) TileUnit::load<3>(acc_RV + 16 * width + 16, width * 4);
  for (int key = begin; key < end; key += 32) {
    TileUnit::load<4>(p + key, TILE_STEP_KEYS * 2);
    if constexpr (R > 1) TileUnit::load<5>(p + 16 * TILE_STEP_KEYS + key, TILE_STEP_KEYS * 2);
    TileUnit::load<6>(values + key / 2 * 16, 64);
    if constexpr (C > 1) TileUnit::load<7>(values + (TILE_STEP_KEYS / 2 + key / 2) * 16, 64);
    multiply_all<R, C>();
  }
  store_all<R, C>(acc_RV, width);
}

// Scores to the power of two that stand for them: maxima are kept in scores before this factor.
REMORA_INLINE float log2_factor(const Rules& rules) {
  return (rules.soft_cap != 0.0f ? rules.soft_cap : rules.scale) * 1.44269504088896341f;
}

// Soft cap and mask of one row, in place -> its largest score.
REMORA_INLINE float tile_mask(const Rules& rules, const Row& row, int64_t key, int begin, int end,
                              float* score) {
  const i32x16 iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (rules.soft_cap != 0.0f)
    for (int i = begin; i < end; i += 16)
      store(score + i, tanh16(load(score + i) * splat(rules.scale / rules.soft_cap)));
  f32x16 best = splat(-INFINITY);
  if (row.first > key + begin || row.position < key + end - 1) {
    const int first = row.first > key ? (int)(row.first - key) : 0;
    const int last = row.position < key ? -1 : (int)(row.position - key);
    for (int i = begin; i < end; i += 16) {
      const i32x16 offset = iota + i;
      const f32x16 seen = (offset >= first) & (offset <= last) ? load(score + i) : splat(-INFINITY);
      store(score + i, seen);
      best = largest16(best, seen);
    }
  } else {
    for (int i = begin; i < end; i += 16) best = largest16(best, load(score + i));
  }
  return max_lane(best);
}

// One online-softmax step of at most 16 rows: weights for the second product go to `p`, and what the
// rows have summed is brought to the new maxima.
REMORA_LOOP void tile_softmax(const Rules& rules, const Row* rows, int num_rows, const TileStep& step,
                              int begin, int end, float* score, uint16_t* p, const State& state,
                              int64_t width) {
  alignas(64) float largest[16], shift[16], decay[16];
  store(largest, splat(-INFINITY));
  for (int r = 0; r < num_rows; ++r)
    largest[r] = tile_mask(rules, rows[r], step.key, begin, end, score + r * TILE_STEP_KEYS);
  const f32x16 factor = splat(log2_factor(rules)), before = load(state.max_R);
  const f32x16 after = largest16(load(largest), before);
  const f32x16 shifts = (after == splat(-INFINITY) ? splat(0.0f) : after) * factor;
  store(shift, splat(0.0f) - shifts);
  // exactly 1 where the maximum stays
  const f32x16 power = multiply_add(before, factor, splat(0.0f) - shifts);
  store(decay, before == after ? splat(1.0f) : exp2_16(power));
  store(state.max_R, after);
  for (int r = 0; r < num_rows; ++r) {
    f32x16 sum = load(state.sum_R16 + r * 16) * splat(decay[r]);
    const f32x16 down = splat(shift[r]);
    for (int i = begin; i < end; i += 16) {
      const f32x16 y = exp2_16(multiply_add(load(score + r * TILE_STEP_KEYS + i), factor, down));
      sum = sum + y;
      *(u16x16u*)(p + r * TILE_STEP_KEYS + i) = round_bf16(y);
    }
    store(state.sum_R16 + r * 16, sum);
    if (decay[r] == 1.0f) continue;
    for (int64_t lane = 0; lane < width; lane += 16)
      store(state.acc_RV + r * width + lane,
            load(state.acc_RV + r * width + lane) * splat(decay[r]));
  }
}

// One step of R tiles of rows; the last ones may be beyond the tile's (their sums mean nothing).
template <int R>
REMORA_LOOP void tile_rows(const Rules& rules, const Tile& tile, const TileStep& step,
                           const State& whole, int first_row) {
  alignas(64) float score[R * 16 * TILE_STEP_KEYS];
  alignas(64) uint16_t p[R * 16 * TILE_STEP_KEYS];
  const Row* rows = tile.rows + first_row;
  const int left = tile.num_rows - first_row, count = left < R * 16 ? left : R * 16;
  // What any of these rows sees: their positions ascend.
  const int64_t from = (rows[0].first - step.key) / 32 * 32;
  const int64_t to = (rows[count - 1].position - step.key + 32) / 32 * 32;
  const int begin = from > step.begin ? (int)from : step.begin;
  const int end = to < step.end ? (int)to : step.end;
  if (begin >= end || rows[count - 1].position < step.key) return;
  const State state = whole.at_row(first_row, tile.width);
  const int32_t* q = tile.q_WR + (int64_t)first_row * tile.words;
  for (int key = begin; key < end; key += 32)
    tile_scores<R>(q, tile.words, step.key_blocks[key / 16], step.key_blocks[key / 16 + 1],
                   score + key);
  if (count < R * 16)
    __builtin_memset(p + count * TILE_STEP_KEYS, 0, sizeof p - count * TILE_STEP_KEYS * sizeof *p);
  for (int r = 0; r < count; r += 16)
    tile_softmax(rules, rows + r, count - r < 16 ? count - r : 16, step, begin, end,
                 score + r * TILE_STEP_KEYS, p + r * TILE_STEP_KEYS, state.at_row(r, tile.width),
                 tile.width);
  int lane = 0;
  for (; lane + 32 <= tile.width; lane += 32)
    tile_values<R, 2>(p, step.values + lane / 2 * TILE_STEP_KEYS, begin, end, state.acc_RV + lane,
                      tile.width);
  if (lane < tile.width)
    tile_values<R, 1>(p, step.values + lane / 2 * TILE_STEP_KEYS, begin, end, state.acc_RV + lane,
                      tile.width);
}

static bool run_tile(const Rules& rules, const Keys& keys, const Tile& tile, int head,
                     State state, bool apart, int64_t part_floats) {
  const int padded = (tile.num_rows + 15) / 16 * 16;
  const float unit = rules.soft_cap != 0.0f ? rules.soft_cap : rules.scale;
  const int64_t begin = keys.from / TILE_STEP_KEYS * TILE_STEP_KEYS;
  TileStep step;
  clear_state(state, padded, tile.width);
  for (int64_t key = begin; key < keys.to; key += TILE_STEP_KEYS) {
    if (!open_step(keys, head, key, tile.edge_2V, &step)) return false;
    int row = 0;
    for (; row + 16 < tile.num_rows; row += 32) tile_rows<2>(rules, tile, step, state, row);
    if (row < tile.num_rows) tile_rows<1>(rules, tile, step, state, row);
    const int64_t after = key + TILE_STEP_KEYS;
    if (after < keys.to && (!apart || after % SPAN_KEYS != 0)) continue;
    for (int r = 0; r < padded; ++r) state.max_R[r] *= unit;  // as Kernel::merge and finish want it
    if (after >= keys.to) break;
    state = {state.max_R + part_floats, state.sum_R16 + part_floats, state.acc_RV + part_floats};
    clear_state(state, padded, tile.width);
  }
  return true;
}

// Kernel::run_tiled.
static bool run_tiled(const Rules& rules, const Keys& keys, const Tile* tiles, int num_heads,
                      int first_head, State* total, State* part, bool apart, int64_t part_floats) {
  TileUnit::begin();
  bool good = true;
  for (int h = 0; good && h < num_heads; ++h)
    good = run_tile(rules, keys, tiles[h], first_head + h, apart ? part[h] : total[h], apart,
                    part_floats);
  TileUnit::end();
  return good;
}

#undef REMORA_TILE
