// Paged attention: what its parts share. attention.cpp has the operators, attention_run.cpp cuts a
// step into units of work, attention_isa.cpp holds the arithmetic (attention_kernel.h) once per
// instruction set, attention_write.h stores keys and values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace remora_attention {

struct WordF32 {
  static constexpr int num_elements = 1, element_bytes = 4;
};
struct WordBF16 {
  static constexpr int num_elements = 2, element_bytes = 2;
};

// Keys of one chunk, the step of the online softmax; and of one span, which has a softmax of its
// own. Both are absolute: position p is in chunk p / 64 and span p / 256. A row's spans are merged
// in ascending order, whoever computed them, so a long context can be shared between threads
// (Dao et al., Flash-Decoding, 2023) without a bit depending on how.
constexpr int64_t CHUNK_KEYS = 64, SPAN_KEYS = 256;

// On tiles (attention_tiles.h): keys of a softmax step, a part of a span.
constexpr int TILE_STEP_KEYS = 128;

struct Rules {
  float scale, soft_cap;  // soft_cap 0: none
  int64_t window, chunk;  // 0: none
};

struct Pages {
  int32_t *keys, *values;
  int64_t num_blocks, num_heads;
  int64_t key_block, key_head, value_block, value_head;  // strides, in words
  int k_dim, v_dim, element_bytes;
  int words;  // of a key
  int width;  // value lanes, a multiple of 16
};

struct Row {
  int64_t position, first;  // sees keys first..position
  void* out;
};

// Sums of some rows over some keys, unnormalised.
struct State {
  float* max_R;    // maximum of the scores
  float* sum_R16;  // sum of the weights, by lane
  float* acc_RV;   // weighted values

  State at_row(int64_t row, int64_t width) const {
    return {max_R + row, sum_R16 + row * 16, acc_RV + row * width};
  }
};

// Query rows of one sequence and key/value head.
struct Tile {
  int words, width;  // as in Pages
  int num_rows;
  const Row* rows;
  int32_t* q_WR;     // packed queries: groups of rows_max rows, word by word; for tiles row by row
  int32_t* edge_2V;  // value rows cut at the context's two ends; room for two chunks, or for what
                     // attention_tiles.h copies
};

// Keys [from, to) of the tiles' context [low, high).
struct Keys {
  const Pages* pages;
  const int32_t* table;
  int64_t low, high, from, to;
};

// The arithmetic of one instruction set and dtype.
struct Kernel {
  int rows_max;  // of a group
  // Attention of some heads' tiles (of the same rows) over the keys, chunk by chunk, in each chunk
  // head by head, as they lie in memory. The first span goes into `total` [heads], each later one
  // into `part` [heads] and is merged; or (`apart`) each into a part of its own, `part_floats`
  // floats behind the last one's, and none is merged. False: a block id is out of range.
  bool (*run)(const Rules&, const Keys&, const Tile*, int num_heads, int first_head, State* total,
              State* part, bool apart, int64_t part_floats);
  // The same on tiles of AMX, for queries packed row by row: other bits. nullptr: none.
  decltype(run) run_tiled;
  // total += part, in the rows that see any of the keys [from, to).
  void (*merge)(const State& total, const State& part, const Tile&, int64_t from, int64_t to);
  // Normalises and writes `out`; `sink_R` (or nullptr): a logit that joins the denominator.
  void (*finish)(const State& total, const float* sink_R, const Tile&, int v_dim);
  // Stores keys and values of 16 tokens that fill a block, one row every so many bytes, for keys of
  // whole vectors of words and values without padding. nullptr: none.
  void (*write_block)(const Pages&, int64_t block, int64_t head, const char* k, int64_t k_row_bytes,
                      const char* v, int64_t v_row_bytes);
};

// Levels are those of isa.h up to AMX's, which adds run_tiled; kEmulatedTiles: in plain C++.
constexpr int kEmulatedTiles = 5;
Kernel choose_kernel(bool bfloat16, int level);

// A plan's tensors in one: five numbers, then [S + 1] first rows, [S] starts, [S, M] block ids.
struct Plan {
  int64_t num_rows, num_tokens, num_sequences, table_width, block_id_max;
  const int32_t *query_start, *start, *table;
};

struct Strided {  // [T, heads, d] with contiguous rows
  const char* data;
  int64_t row_bytes, head_bytes;

  const char* at(int64_t row, int64_t head) const {
    return data + row * row_bytes + head * head_bytes;
  }
};

struct Call {
  Rules rules;
  Pages pages;
  Plan plan;
  Kernel kernel;
  Strided q;
  const Strided *k, *v;  // to be written first; nullptr: they are in the pages
  char* out;             // [T, H, v_dim]
  const float* sinks;    // [H]; nullptr: none
  int64_t group;         // query heads of one key/value head
};

// Writes and attends; rows from num_tokens on become zeros. False: a block id is out of range.
bool run_attention(const Call& call);

}  // namespace remora_attention
