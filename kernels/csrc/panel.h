// The one building block of all packed linears: a run of rows times one group of packed columns.
//
// Packed weights [O, K] are cut into groups of 64 output columns; the last group is narrower, a
// multiple of 16. Inside a group the order is [step][column] (float32, one k a step) or
// [step][column][2] (bfloat16, two k a step, zero padded): what `vdpbf16ps` wants, and a tile of
// AMX (rows one group width apart). A group is one sequential stream of memory.
//
// Weights of one byte (int8 with a scale for each output) are sign and magnitude, four k a step:
// [step][panel][4 runs of 4 columns][2][column][2]. Both halves of a run widen in place to what
// `vdpbf16ps` wants.
//
// Every output element is one float32 accumulator over the steps in one fixed order (ascending; on
// AMX even and odd k of 32 apart, see amx_tiling.h), whatever the number of rows and the tile it
// falls into: rows are independent of each other bit for bit.
#pragma once

#include <cstdint>

namespace remora {

constexpr int64_t kPanel = 16;                 // columns of one register
constexpr int64_t kGroupPanels = 4;            // panels of one group
constexpr int64_t kGroup = kPanel * kGroupPanels;

// How far ahead of their use weights are asked for: what memory delivers in one latency, and more.
constexpr int64_t kAheadBytes = 8192;

struct PanelCall {
  const void* x;        // first row; rows hold 2 * num_steps (bfloat16) or num_steps (float32) values
  int64_t x_stride;     // elements between rows
  int64_t num_rows;
  const void* weights;  // the group
  int64_t num_steps;
  int num_panels;       // of the group: 1..4
  const void* bias;     // first column of the group, dtype of x; or null
  const float* scale;   // first column of the group; of one-byte weights only
  void* out;            // first row, first column of the group
  int64_t out_stride;   // elements between rows
  int num_columns;      // columns to write: 16 * (num_panels - 1) < num_columns <= 16 * num_panels
  const void* const* x_rows = nullptr;  // where rows lie anywhere: one pointer each, instead of x;
                                        // not where panel_is_tiled
  void* const* out_rows = nullptr;      // and instead of out; the group's column is out_column
  int64_t out_column = 0;
  const void* next = nullptr;  // weights that the same thread reads afterwards, if it is known
};

using PanelKernel = void (*)(const PanelCall&);

// The kernel for this machine and dtype of the rows; `int8`: bfloat16 rows, one-byte weights.
PanelKernel panel_kernel(bool bfloat16, bool int8 = false);

// Whether that kernel works on tiles (AMX), which are loaded from rows one stride apart.
bool panel_is_tiled(bool bfloat16);

// Most rows of one task, over weights that stay in the second cache: 32 tiles of 6, 6 pairs of AMX's.
constexpr int64_t kRowBlock = 192;

// Rows times an ordinary weight [O, K] (a router's): see row_tiles.h for the order of the sum.
struct RowCall {
  const void* x;
  int64_t x_stride;  // elements between rows
  int64_t num_rows;
  const void* weights;
  int64_t weight_stride;  // elements between outputs
  int64_t num_outputs;
  int64_t num_inputs;
  const void* bias;  // dtype of x; or null
  void* out;
  int64_t out_stride;  // elements between rows
};

using RowKernel = void (*)(const RowCall&);

RowKernel row_kernel(bool bfloat16);

// Every instruction set has these five; avx512_bf16 leaves float32 to avx512.
#define REMORA_DECLARE(isa_namespace)      \
  namespace isa_namespace {                \
  void panel_float(const PanelCall&);      \
  void panel_bfloat16(const PanelCall&);   \
  void panel_int8(const PanelCall&);       \
  void row_float(const RowCall&);          \
  void row_bfloat16(const RowCall&);       \
  }
REMORA_DECLARE(portable)
REMORA_DECLARE(avx2)
REMORA_DECLARE(avx512)
REMORA_DECLARE(avx512_bf16)
#undef REMORA_DECLARE

}  // namespace remora
