// Attention of one tile of query rows over paged keys and values, for one instruction set.
//
// Included by attention.cpp once per instruction set, inside a namespace and under the matching
// `#pragma GCC target`; REMORA_ISA says which: 0 portable, 1 AVX2 + FMA, 2 AVX-512, 3 AVX-512 with
// bf16 dot products. Only the primitives at the top differ; nothing of the standard library is
// instantiated here, since the pragma would leak into code that other translation units share.
//
// A vector is 16 lanes of 32 bits: a float, an int, or two bfloat16. Per (row, key) the sum over
// the key's words, per row the online softmax over absolute chunks of 64 keys, and per (row, value
// lane) the sum over keys each run in one order that no tile shape changes: so do the bits.

typedef float f32x16 __attribute__((vector_size(64), may_alias));
typedef int32_t i32x16 __attribute__((vector_size(64), may_alias));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16u __attribute__((vector_size(32), aligned(2), may_alias));

#define REMORA_INLINE static inline __attribute__((always_inline))
#define REMORA_LOOP static __attribute__((noinline))

// Rows whose scores are computed together: 6 rows x 4 key vectors fill the 32 AVX-512 registers.
constexpr int ROWS_MAX = REMORA_ISA >= 2 ? 6 : 1;

REMORA_INLINE f32x16 splat(float x) { return f32x16{} + x; }
REMORA_INLINE i32x16 splat_word(int32_t x) { return i32x16{} + x; }
REMORA_INLINE i32x16 load_words(const int32_t* p) { return *(const i32x16*)p; }
REMORA_INLINE f32x16 load(const float* p) { return *(const f32x16*)p; }
REMORA_INLINE void store(float* p, f32x16 x) { *(f32x16*)p = x; }

REMORA_INLINE f32x16 fma16(f32x16 a, f32x16 b, f32x16 c) {
#if REMORA_ISA >= 2
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif REMORA_ISA == 1
  union Halves { f32x16 whole; __m256 half[2]; } x{a}, y{b}, z{c};
  z.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
  z.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
  return z.whole;
#else
  return a * b + c;
#endif
}

// acc + the products of words, element by element of a word: Word is float or BF16 (two of them).
template <class Word>
REMORA_INLINE f32x16 dot(f32x16 acc, i32x16 a, int32_t b) {
  if constexpr (Word::num_elements == 1) {
    return fma16((f32x16)a, (f32x16)splat_word(b), acc);
  } else {
#if REMORA_ISA == 3
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)splat_word(b));
#else
    const i32x16 high = splat_word((int32_t)0xffff0000);
    const i32x16 b16 = splat_word(b);
    acc = fma16((f32x16)(a << 16), (f32x16)(b16 << 16), acc);
    return fma16((f32x16)(a & high), (f32x16)(b16 & high), acc);
#endif
  }
}

REMORA_INLINE u16x16 round_bf16(f32x16 x) {
#if REMORA_ISA == 3
  return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
  const u32x16 bits = (u32x16)x;
  const u32x16 rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  return __builtin_convertvector(rounded, u16x16);
#endif
}

REMORA_INLINE f32x16 max16(f32x16 a, f32x16 b) { return a > b ? a : b; }

REMORA_INLINE float max_lane(f32x16 x) {
#if REMORA_ISA >= 2
  return _mm512_reduce_max_ps((__m512)x);
#else
  float best = x[0];
  for (int i = 1; i < 16; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

REMORA_INLINE float sum_lanes(f32x16 x) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] = x[i] + x[i + width];
  return x[0];
}

// exp for x <= 88, relative error below 2e-7; exactly 1 at 0 and exactly 0 below -87.
// Range reduction by log 2 in two parts, Taylor polynomial of degree 7 on |r| <= log(2) / 2.
REMORA_INLINE f32x16 exp16(f32x16 x) {
  const f32x16 clamped = x < splat(-87.0f) ? splat(-87.0f) : x;
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 shifted = fma16(clamped, splat(1.44269504088896341f), magic);
  const f32x16 n = shifted - magic;
  f32x16 r = fma16(n, splat(-0.693145751953125f), clamped);
  r = fma16(n, splat(-1.42860682030941723e-6f), r);
  f32x16 y = splat(1.0f / 5040.0f);
  y = fma16(y, r, splat(1.0f / 720.0f));
  y = fma16(y, r, splat(1.0f / 120.0f));
  y = fma16(y, r, splat(1.0f / 24.0f));
  y = fma16(y, r, splat(1.0f / 6.0f));
  y = fma16(y, r, splat(0.5f));
  y = fma16(y, r, splat(1.0f));
  y = fma16(y, r, splat(1.0f));
  const i32x16 exponent = ((i32x16)shifted - (i32x16)magic + 127) << 23;
  y = y * (f32x16)exponent;
  return x < splat(-87.0f) ? splat(0.0f) : y;
}

REMORA_INLINE f32x16 tanh16(f32x16 x) {
  const f32x16 size = x < splat(0.0f) ? -x : x;
  const f32x16 bound = size > splat(20.0f) ? splat(20.0f) : size;
  const f32x16 large = splat(1.0f) - splat(2.0f) / (exp16(bound + bound) + splat(1.0f));
  const f32x16 square = bound * bound;  // Taylor series where the quotient would cancel
  f32x16 y = splat(62.0f / 2835.0f);
  y = fma16(y, square, splat(-17.0f / 315.0f));
  y = fma16(y, square, splat(2.0f / 15.0f));
  y = fma16(y, square, splat(-1.0f / 3.0f));
  y = fma16(y, square, splat(1.0f));
  const f32x16 magnitude = bound < splat(0.2f) ? y * bound : large;
  return x < splat(0.0f) ? -magnitude : magnitude;
}

// The chunk that all row groups of a tile share.
struct Chunk {
  int64_t key;                      // its first key's position
  const int32_t* key_blocks[4];     // blocks outside the tile's context repeat one inside
  const int32_t* value_rows[64];    // one per value word row; only [from, to) are read
  int from, to;
};

// Scores of R rows against the chunk's 64 keys -> score_R64. `q_WR`: words of the R queries side by
// side. With `next`, the same lines of the next chunk's keys are fetched meanwhile: blocks lie
// anywhere, so no hardware prefetcher follows them.
template <class Word, int R, bool PREFETCH>
REMORA_LOOP void score_rows(const int32_t* q_WR, int64_t words, const Chunk& chunk,
                            const Chunk* next, float* score_R64) {
  f32x16 acc[R][4];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < 4; ++b) acc[r][b] = splat(0.0f);
  const int32_t *k0 = chunk.key_blocks[0], *k1 = chunk.key_blocks[1];
  const int32_t *k2 = chunk.key_blocks[2], *k3 = chunk.key_blocks[3];
  for (int64_t w = 0; w < words; ++w, q_WR += R) {
    if constexpr (PREFETCH)
      for (int b = 0; b < 4; ++b) __builtin_prefetch(next->key_blocks[b] + w * 16);
    const i32x16 key[4] = {load_words(k0 + w * 16), load_words(k1 + w * 16),
                           load_words(k2 + w * 16), load_words(k3 + w * 16)};
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) acc[r][b] = dot<Word>(acc[r][b], key[b], q_WR[r]);
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < 4; ++b) store(score_R64 + r * 64 + b * 16, acc[r][b]);
}

// One online-softmax step of R rows: scores become unnormalised probabilities, packed as the words
// that multiply value rows; decay_R is the factor for what each row has summed before.
template <class Word, int R>
REMORA_INLINE void softmax_rows(const Rules& rules, const Row* rows, int64_t key, float* score_R64,
                                float* max_R, float* sum_R16, int32_t* p_words, float* decay_R) {
  const i32x16 iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) float best[16] = {}, before[16] = {}, shift[16], decay[16];
  for (int r = 0; r < R; ++r) {
    float* score = score_R64 + r * 64;
    if (rules.soft_cap != 0.0f)
      for (int i = 0; i < 64; i += 16)
        store(score + i, tanh16(load(score + i) * splat(rules.scale) / splat(rules.soft_cap)) *
                             splat(rules.soft_cap));
    else
      for (int i = 0; i < 64; i += 16) store(score + i, load(score + i) * splat(rules.scale));
    if (rows[r].first > key || rows[r].position < key + 63) {
      const int first = rows[r].first > key ? (int)(rows[r].first - key) : 0;
      const int last = rows[r].position < key ? -1 : (int)(rows[r].position - key);
      for (int i = 0; i < 64; i += 16) {
        const i32x16 offset = iota + i;
        const i32x16 seen = (offset >= first) & (offset <= last);
        store(score + i, seen ? load(score + i) : splat(-INFINITY));
      }
    }
    best[r] = max_lane(max16(max16(load(score), load(score + 16)),
                             max16(load(score + 32), load(score + 48))));
    before[r] = max_R[r];
  }
  const f32x16 new_max = max16(load(best), load(before));
  const f32x16 shifts = new_max == splat(-INFINITY) ? splat(0.0f) : new_max;  // nothing seen yet
  store(decay, exp16(load(before) - shifts));  // exactly 1 where the maximum stays
  store(shift, shifts);
  store(best, new_max);
  for (int r = 0; r < R; ++r) {
    max_R[r] = best[r];
    decay_R[r] = decay[r];
    f32x16 sum = load(sum_R16 + r * 16) * splat(decay[r]);
    for (int i = 0; i < 64; i += 16) {
      const f32x16 p = exp16(load(score_R64 + r * 64 + i) - splat(shift[r]));
      sum = sum + p;
      if constexpr (Word::num_elements == 1)
        store((float*)p_words + r * 64 + i, p);
      else
        *(u16x16u*)((uint16_t*)p_words + r * 64 + i) = round_bf16(p);
    }
    store(sum_R16 + r * 16, sum);
  }
}

// acc = acc * decay + P V for R rows and N vectors of value lanes from `lane` on, over the chunk's
// value rows; fetches the next chunk's as `score_rows` does.
template <class Word, int R, int N, bool PREFETCH>
REMORA_LOOP void add_values(const int32_t* p_RS, const float* decay_R, const Chunk& chunk,
                            const Chunk* next, int64_t lane, float* acc_RV, int64_t width) {
  constexpr int64_t steps = 64 / Word::num_elements;
  f32x16 acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n)
      acc[r][n] = load(acc_RV + r * width + lane + n * 16) * splat(decay_R[r]);
  const int64_t to = chunk.to;
  for (int64_t i = chunk.from; i < to; ++i) {
    const int32_t* row = chunk.value_rows[i] + lane;
    if constexpr (PREFETCH)
      for (int n = 0; n < N; ++n) __builtin_prefetch(next->value_rows[i] + lane + n * 16);
    i32x16 value[N];
    for (int n = 0; n < N; ++n) value[n] = load_words(row + n * 16);
#pragma GCC unroll 6
    for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = dot<Word>(acc[r][n], value[n], p_RS[r * steps + i]);
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(acc_RV + r * width + lane + n * 16, acc[r][n]);
}

// One chunk for R rows of a tile from `first_row` on.
template <class Word, int R, bool PREFETCH>
static void group_step(const Rules& rules, const Row* rows, const Chunk& chunk, const Chunk* next,
                       const Tile& tile, int64_t first_row) {
  alignas(64) float score[R * 64];
  alignas(64) int32_t p[R * (64 / Word::num_elements)];
  float decay[R];
  score_rows<Word, R, PREFETCH>(
      tile.q_WR + first_row * tile.words, tile.words, chunk, next, score);
  softmax_rows<Word, R>(rules, rows + first_row, chunk.key, score, tile.max_R + first_row,
                        tile.sum_R16 + first_row * 16, p, decay);
  float* acc = tile.acc_RV + first_row * tile.width;
  int64_t lane = 0;
  for (; lane + 64 <= tile.width; lane += 64)
    add_values<Word, R, 4, PREFETCH>(p, decay, chunk, next, lane, acc, tile.width);
  for (; lane < tile.width; lane += 16)
    add_values<Word, R, 1, PREFETCH>(p, decay, chunk, next, lane, acc, tile.width);
}

template <class Word, int R>
REMORA_INLINE void group_step(const Rules& rules, const Row* rows, const Chunk& chunk,
                              const Chunk* next, const Tile& tile, int64_t first_row) {
  if (next != nullptr)
    group_step<Word, R, true>(rules, rows, chunk, next, tile, first_row);
  else
    group_step<Word, R, false>(rules, rows, chunk, next, tile, first_row);
}

template <class Word>
static void tile_step(const Rules& rules, const Row* rows, const Chunk& chunk, const Chunk* next,
                      const Tile& tile, int num_rows) {
  int row = 0;
  for (; row + ROWS_MAX <= num_rows; row += ROWS_MAX)
    group_step<Word, ROWS_MAX>(rules, rows, chunk, row == 0 ? next : nullptr, tile, row);
#if REMORA_ISA >= 2
  if (row > 0) next = nullptr;  // fetched by the first group
  switch (num_rows - row) {
    case 5: group_step<Word, 5>(rules, rows, chunk, next, tile, row); break;
    case 4: group_step<Word, 4>(rules, rows, chunk, next, tile, row); break;
    case 3: group_step<Word, 3>(rules, rows, chunk, next, tile, row); break;
    case 2: group_step<Word, 2>(rules, rows, chunk, next, tile, row); break;
    case 1: group_step<Word, 1>(rules, rows, chunk, next, tile, row); break;
  }
#endif
}

// Finds the chunk's blocks. A pair of value rows of which only one is in the context is copied
// with the other zeroed: stale bytes may be NaN, and 0 * NaN is NaN. False: a bad block id.
template <class Word>
static bool open_chunk(const Pages& pages, const int32_t* table, const Tile& tile, int head,
                       int64_t key, int64_t low, int64_t high, Chunk* chunk) {
  constexpr int E = Word::num_elements, per_block = 16 / E;
  const int64_t begin = key > low ? key : low, end = key + 64 < high ? key + 64 : high;
  const int first_block = (int)((begin - key) / 16), last_block = (int)((end - 1 - key) / 16);
  chunk->key = key;
  for (int b = 0; b < 4; ++b) {
    const int inside = b < first_block ? first_block : b > last_block ? last_block : b;
    const int64_t block = table[key / 16 + inside];
    if (block < 0 || block >= pages.num_blocks) return false;
    chunk->key_blocks[b] = pages.keys + (block * pages.num_heads + head) * pages.key_words;
    const int32_t* values = pages.values + (block * pages.num_heads + head) * pages.value_words;
    for (int i = 0; i < per_block; ++i)
      chunk->value_rows[b * per_block + i] = values + (int64_t)i * tile.width;
  }
  chunk->from = (int)((begin - key) / E);
  chunk->to = (int)((end - key + E - 1) / E);
  if constexpr (E == 2) {
    if ((begin - key) % 2 != 0) {
      const int32_t* row = chunk->value_rows[chunk->from];
      for (int i = 0; i < tile.width; ++i) tile.edge_2V[i] = row[i] & (int32_t)0xffff0000;
      chunk->value_rows[chunk->from] = tile.edge_2V;
    }
    if ((end - key) % 2 != 0) {
      const int32_t* row = chunk->value_rows[chunk->to - 1];
      for (int i = 0; i < tile.width; ++i) tile.edge_2V[tile.width + i] = row[i] & 0xffff;
      chunk->value_rows[chunk->to - 1] = tile.edge_2V + tile.width;
    }
  }
  return true;
}

// All chunks of one tile; `rows` say what each sees, tile.q_WR holds their packed queries, and
// tile.max_R / sum_R16 / acc_RV their start (sinks included). Writes `out` rows of T elements.
template <class Word>
static bool run_tile(const Rules& rules, const Pages& pages, const int32_t* table, const Tile& tile,
                     const Row* rows, int num_rows, int head) {
  int64_t low = rows[0].first, high = 0;
  for (int r = 0; r < num_rows; ++r) {
    low = rows[r].first < low ? rows[r].first : low;
    high = rows[r].position + 1 > high ? rows[r].position + 1 : high;
  }
  Chunk chunks[2];
  int64_t key = low / 64 * 64;
  if (!open_chunk<Word>(pages, table, tile, head, key, low, high, &chunks[0])) return false;
  for (int current = 0; key < high; key += 64, current ^= 1) {
    Chunk* next = key + 64 < high ? &chunks[current ^ 1] : nullptr;
    if (next && !open_chunk<Word>(pages, table, tile, head, key + 64, low, high, next)) return false;
    tile_step<Word>(rules, rows, chunks[current], next, tile, num_rows);
  }
  for (int r = 0; r < num_rows; ++r) {
    const f32x16 total = splat(sum_lanes(load(tile.sum_R16 + (int64_t)r * 16)));
    for (int lane = 0; lane < tile.width; lane += 16) {
      const f32x16 y = load(tile.acc_RV + (int64_t)r * tile.width + lane) / total;
      alignas(64) float buffer[16];
      if constexpr (Word::num_elements == 1)
        store(buffer, y);
      else
        *(u16x16u*)buffer = round_bf16(y);
      const int count = pages.v_dim - lane < 16 ? pages.v_dim - lane : 16;
      if (count > 0)
        __builtin_memcpy((char*)rows[r].out + lane * Word::element_bytes, buffer,
                         count * Word::element_bytes);
    }
  }
  return true;
}
