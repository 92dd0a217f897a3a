// Attention of one tile of query rows over paged keys and values, for one instruction set.
//
// Included by attention_isa.cpp once per instruction set, inside a namespace and under the matching
// `#pragma GCC target`; REMORA_ISA says which: 0 portable, 1 AVX2 + FMA, 2 AVX-512, 3 AVX-512 with
// bf16 dot products. Only attention_vector.h differs; nothing of the standard library is
// instantiated here, since the pragma would leak into code that other translation units share.
//
// A vector is 16 lanes of 32 bits: a float, an int, or two bfloat16. Per (row, key) the sum over
// the key's words, per row the online softmax over absolute chunks of 64 keys and the merge of
// absolute spans of 256, and per (row, value lane) the sum over keys each run in one order that no
// tile shape and no cut between threads changes: so do the bits.

#include "attention_vector.h"

// Rows whose scores are computed together: 6 rows x 4 key vectors fill the 32 AVX-512 registers.
constexpr int ROWS_MAX = REMORA_ISA >= 2 ? 6 : 1;

// The chunk that all row groups of a tile share.
struct Chunk {
  struct Values {  // word rows that lie one behind the other
    const int32_t* rows;
    int count;
  };
  int64_t key;                    // its first key's position
  const int32_t* key_blocks[4];   // blocks outside the tile's context repeat one inside
  const int32_t* value_blocks[4];
  Values values[6];               // what is in the context: four blocks and two cut rows
  int num_values, from;           // from: the first word row that is
};

// Scores of R rows against the chunk's 64 keys -> score_R64. `q_WR`: words of the R queries side by
// side. With `next`, the same lines of the next chunk's keys are fetched meanwhile: blocks may lie
// anywhere, where no hardware prefetcher follows.
template <class Word, int R, bool PREFETCH>
REMORA_LOOP void score_rows(const int32_t* q_WR, int64_t words, const Chunk& chunk,
                            const Chunk* next, float* score_R64) {
  Sums acc[R][4];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < 4; ++b) acc[r][b] = splat_sums(0.0f);
  const int32_t *k0 = chunk.key_blocks[0], *k1 = chunk.key_blocks[1];
  const int32_t *k2 = chunk.key_blocks[2], *k3 = chunk.key_blocks[3];
  for (int64_t w = 0; w < words; ++w, q_WR += R) {
    if constexpr (PREFETCH)
      for (int b = 0; b < 4; ++b) __builtin_prefetch(next->key_blocks[b] + w * 16);
    if constexpr (R == 1) {  // keys one vector at a time: fewest registers
      acc[0][0] = dot<Word>(acc[0][0], words_at(k0 + w * 16), q_WR[0]);
      acc[0][1] = dot<Word>(acc[0][1], words_at(k1 + w * 16), q_WR[0]);
      acc[0][2] = dot<Word>(acc[0][2], words_at(k2 + w * 16), q_WR[0]);
      acc[0][3] = dot<Word>(acc[0][3], words_at(k3 + w * 16), q_WR[0]);
      continue;
    }
    const Words key[4] = {words_at(k0 + w * 16), words_at(k1 + w * 16), words_at(k2 + w * 16),
                          words_at(k3 + w * 16)};
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
  constexpr int64_t steps = 64 / Word::num_elements, per_block = steps / 4;
  Sums acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n)
      acc[r][n] = scaled_sums(acc_RV + r * width + lane + n * 16, decay_R[r]);
  p_RS += chunk.from;
  int64_t index = chunk.from;
  for (const Chunk::Values* part = chunk.values; part < chunk.values + chunk.num_values; ++part) {
    const int32_t* row = part->rows + lane;
    for (const int32_t* end = p_RS + part->count; p_RS < end; ++p_RS, row += width) {
      if constexpr (PREFETCH) {
        const int32_t* ahead = next->value_blocks[index / per_block] + index % per_block * width;
        for (int n = 0; n < N; ++n) __builtin_prefetch(ahead + lane + n * 16);
        ++index;
      }
      Words value[N];
      for (int n = 0; n < N; ++n) value[n] = words_at(row + n * 16);
#pragma GCC unroll 6
      for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = dot<Word>(acc[r][n], value[n], p_RS[r * steps]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(acc_RV + r * width + lane + n * 16, acc[r][n]);
}

// One chunk for R rows of a tile from `first_row` on.
template <class Word, int R, bool PREFETCH>
static void group_step(const Rules& rules, const Tile& tile, const Chunk& chunk, const Chunk* next,
                       const State& whole, int64_t first_row) {
  alignas(64) float score[R * 64];
  alignas(64) int32_t p[R * (64 / Word::num_elements)];
  float decay[R];
  const State state = whole.at_row(first_row, tile.width);
  score_rows<Word, R, PREFETCH>(
      tile.q_WR + first_row * tile.words, tile.words, chunk, next, score);
  softmax_rows<Word, R>(rules, tile.rows + first_row, chunk.key, score, state.max_R,
                        state.sum_R16, p, decay);
  int64_t lane = 0;
  for (; lane + 64 <= tile.width; lane += 64)
    add_values<Word, R, 4, PREFETCH>(p, decay, chunk, next, lane, state.acc_RV, tile.width);
  for (; lane < tile.width; lane += 16)
    add_values<Word, R, 1, PREFETCH>(p, decay, chunk, next, lane, state.acc_RV, tile.width);
}

template <class Word, int R>
REMORA_INLINE void group_step(const Rules& rules, const Tile& tile, const Chunk& chunk,
                              const Chunk* next, const State& state, int64_t first_row) {
  if (next != nullptr)
    group_step<Word, R, true>(rules, tile, chunk, next, state, first_row);
  else
    group_step<Word, R, false>(rules, tile, chunk, next, state, first_row);
}

template <class Word>
static void tile_step(const Rules& rules, const Tile& tile, const Chunk& chunk, const Chunk* next,
                      const State& state) {
  int row = 0;
  for (; row + ROWS_MAX <= tile.num_rows; row += ROWS_MAX)
    group_step<Word, ROWS_MAX>(rules, tile, chunk, row == 0 ? next : nullptr, state, row);
#if REMORA_ISA >= 2
  if (row > 0) next = nullptr;  // fetched by the first group
  switch (tile.num_rows - row) {
    case 5: group_step<Word, 5>(rules, tile, chunk, next, state, row); break;
    case 4: group_step<Word, 4>(rules, tile, chunk, next, state, row); break;
    case 3: group_step<Word, 3>(rules, tile, chunk, next, state, row); break;
    case 2: group_step<Word, 2>(rules, tile, chunk, next, state, row); break;
    case 1: group_step<Word, 1>(rules, tile, chunk, next, state, row); break;
  }
#endif
}

// Finds the chunk's blocks. A pair of value rows of which only one is in the context is copied to
// `edge_2V` with the other zeroed: stale bytes may be NaN, and 0 * NaN is NaN. False: a bad block.
template <class Word>
static bool open_chunk(const Keys& keys, int head, int64_t key, int32_t* edge_2V, Chunk* chunk) {
  constexpr int E = Word::num_elements, per_block = 16 / E;
  const Pages& pages = *keys.pages;
  const int64_t begin = key > keys.low ? key : keys.low;
  const int64_t end = key + 64 < keys.high ? key + 64 : keys.high;
  const int first_block = (int)((begin - key) / 16), last_block = (int)((end - 1 - key) / 16);
  chunk->key = key;
  for (int b = 0; b < 4; ++b) {
    const int inside = b < first_block ? first_block : b > last_block ? last_block : b;
    const int64_t block = keys.table[key / 16 + inside];
    if (block < 0 || block >= pages.num_blocks) return false;
    chunk->key_blocks[b] = pages.keys + block * pages.key_block + head * pages.key_head;
    chunk->value_blocks[b] = pages.values + block * pages.value_block + head * pages.value_head;
  }
  const auto row_at = [&](int i) {
    return chunk->value_blocks[i / per_block] + i % per_block * pages.width;
  };
  int row = (int)((begin - key) / E), to = (int)((end - key + E - 1) / E);
  Chunk::Values* part = chunk->values;
  chunk->from = row;
  const bool cut_end = E == 2 && (end - key) % 2 != 0;
  if (E == 2 && (begin - key) % 2 != 0) {
    const int32_t* source = row_at(row++);
    for (int i = 0; i < pages.width; ++i) edge_2V[i] = source[i] & (int32_t)0xffff0000;
    *part++ = {edge_2V, 1};
  }
  for (const int whole = cut_end ? to - 1 : to; row < whole;) {
    const int rest = per_block - row % per_block, count = rest < whole - row ? rest : whole - row;
    *part++ = {row_at(row), count};
    row += count;
  }
  if (row < to) {
    const int32_t* source = row_at(row);
    for (int i = 0; i < pages.width; ++i) edge_2V[pages.width + i] = source[i] & 0xffff;
    *part++ = {edge_2V + pages.width, 1};
  }
  chunk->num_values = (int)(part - chunk->values);
  return true;
}

static void clear_state(const State& state, int num_rows, int width) {
  for (int r = 0; r < num_rows; ++r) state.max_R[r] = -INFINITY;
  __builtin_memset(state.sum_R16, 0, sizeof(float) * num_rows * 16);
  __builtin_memset(state.acc_RV, 0, sizeof(float) * num_rows * width);
}

// Of each row's two maxima, the factors that bring both sums to the larger one.
REMORA_INLINE void merge_factors(float a, float b, float* largest, float* factor_a,
                                 float* factor_b) {
  const f32x16 high = max16(splat(a), splat(b));
  const f32x16 shift = high == splat(-INFINITY) ? splat(0.0f) : high;  // nothing seen yet
  *largest = high[0];
  *factor_a = exp16(splat(a) - shift)[0];
  *factor_b = exp16(splat(b) - shift)[0];
}

// Kernel::merge.
static void merge_states(const State& total, const State& part, const Tile& tile, int64_t from,
                         int64_t to) {
  for (int r = 0; r < tile.num_rows; ++r) {
    if (tile.rows[r].position < from || tile.rows[r].first >= to) continue;
    const State a = total.at_row(r, tile.width), b = part.at_row(r, tile.width);
    if (tile.rows[r].first >= from) {  // its first span
      *a.max_R = *b.max_R;
      __builtin_memcpy(a.sum_R16, b.sum_R16, sizeof(float) * 16);
      __builtin_memcpy(a.acc_RV, b.acc_RV, sizeof(float) * tile.width);
      continue;
    }
    float factor_a, factor_b;
    merge_factors(*a.max_R, *b.max_R, a.max_R, &factor_a, &factor_b);
    store(a.sum_R16, load(a.sum_R16) * splat(factor_a) + load(b.sum_R16) * splat(factor_b));
    for (int i = 0; i < tile.width; i += 16)
      store(a.acc_RV + i,
            load(a.acc_RV + i) * splat(factor_a) + load(b.acc_RV + i) * splat(factor_b));
  }
}

// Kernel::run.
template <class Word>
static bool run_keys(const Rules& rules, const Keys& keys, const Tile* tiles, int num_heads,
                     int first_head, State* total, State* part, bool apart, int64_t part_floats) {
  Chunk chunks[2];
  const int64_t begin = keys.from / CHUNK_KEYS * CHUNK_KEYS;
  State* states = apart ? part : total;
  const auto clear = [&] {
    for (int h = 0; h < num_heads; ++h) clear_state(states[h], tiles[h].num_rows, tiles[h].width);
  };
  clear();
  if (!open_chunk<Word>(keys, first_head, begin, tiles[0].edge_2V, &chunks[0])) return false;
  int current = 0;
  for (int64_t key = begin; key < keys.to; key += CHUNK_KEYS) {
    const int64_t after = key + CHUNK_KEYS;
    for (int h = 0; h < num_heads; ++h, current ^= 1) {
      const bool last = h + 1 == num_heads;
      Chunk* next = last && after >= keys.to ? nullptr : &chunks[current ^ 1];
      if (next && !open_chunk<Word>(keys, first_head + (last ? 0 : h + 1), last ? after : key,
                                    tiles[h].edge_2V + (current ^ 1) * 2 * tiles[h].width, next))
        return false;
      tile_step<Word>(rules, tiles[h], chunks[current], next, states[h]);
    }
    if (after < keys.to && after % SPAN_KEYS != 0) continue;
    if (!apart && states != total)
      for (int h = 0; h < num_heads; ++h)
        merge_states(total[h], part[h], tiles[h], key / SPAN_KEYS * SPAN_KEYS, after);
    if (after >= keys.to) break;
    if (apart)
      for (int h = 0; h < num_heads; ++h)
        part[h] = {part[h].max_R + part_floats, part[h].sum_R16 + part_floats,
                   part[h].acc_RV + part_floats};
    states = part;
    clear();
  }
  return true;
}

// Kernel::finish.
template <class Word>
static void finish_rows(const State& total, const float* sink_R, const Tile& tile, int v_dim) {
  for (int r = 0; r < tile.num_rows; ++r) {
    const State state = total.at_row(r, tile.width);
    float sum = sum_lanes(load(state.sum_R16)), factor = 1.0f, weight = 0.0f, largest;
    if (sink_R != nullptr) {
      merge_factors(*state.max_R, sink_R[r], &largest, &factor, &weight);
      sum = sum * factor + weight;
    }
    for (int lane = 0; lane < tile.width; lane += 16) {
      const f32x16 y = load(state.acc_RV + lane) * splat(factor) / splat(sum);
      alignas(64) float buffer[16];
      if constexpr (Word::num_elements == 1)
        store(buffer, y);
      else
        *(u16x16u*)buffer = round_bf16(y);
      const int count = v_dim - lane < 16 ? v_dim - lane : 16;
      if (count > 0)
        __builtin_memcpy((char*)tile.rows[r].out + lane * Word::element_bytes, buffer,
                         count * Word::element_bytes);
    }
  }
}
