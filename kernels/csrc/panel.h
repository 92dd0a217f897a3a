// The one building block of all packed linears: a run of rows times one group of packed columns.
//
// Packed weights [O, K] are cut into groups of 64 output columns; the last group is narrower, a
// multiple of 16. Inside a group the order is [step][column] (float32, one k a step) or
// [step][column][2] (bfloat16, two k a step, zero padded): what `vdpbf16ps` wants, and a tile of
// AMX (rows one group width apart). A group is one sequential stream of memory.
//
// Weights of one byte (int8) are sign and magnitude, four k a step: [step][panel][4 runs of 4
// columns][2][column][2]. Both halves of a run widen in place to what `vdpbf16ps` wants. Behind the
// steps lies a float32 scale for each column.
//
// Weights of four bits (int4) are sign and magnitude too, eight k a step: as two steps of int8, the
// first in the low halves of the bytes. Before each 8 steps (64 k) lies a line with one byte for each
// column, their scale: (4 + m) / 4 * 2^(kInt4Exponent - e), m the two low bits, e the six high ones.
// So few bits that weight times scale is a bfloat16, exactly: kernels widen to that, and what they
// compute is what the plain kernel computes of the widened weights, bit for bit.
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

// What weights are stored as. Rows are float32 under kFloat32, bfloat16 under all others.
enum class WeightFormat { kFloat32, kBFloat16, kInt8, kInt4 };

constexpr int64_t kInt4BlockSteps = 8;  // of eight k, that share scales
constexpr int kInt4Exponent = 16;       // of the largest scales, 1 to 1.75 times 2^16
constexpr int64_t kLineBytes = 64;      // of one panel and step of int8 and int4; of 64 scales of int4

// How far ahead of their use weights are asked for: what memory delivers in one latency, and more.
constexpr int64_t kAheadBytes = 8192;

struct PanelCall {
  const void* x;        // first row; rows hold as many values as all steps have k
  int64_t x_stride;     // elements between rows
  int64_t num_rows;
  const void* weights;  // the group
  int64_t weight_bytes; // all of it, scales included
  int64_t num_steps;
  int num_panels;       // of the group: 1..4
  const void* bias;     // first column of the group, dtype of x; or null
  const float* scale;   // first column of the group; of kInt8 only
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

PanelKernel panel_kernel(WeightFormat format);  // for this machine

// Whether that kernel works on tiles (AMX), which are loaded from rows one stride apart.
bool panel_is_tiled(WeightFormat format);

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

// Every instruction set has these six; avx512_bf16 leaves float32 to avx512.
#define REMORA_DECLARE(isa_namespace)      \
  namespace isa_namespace {                \
  void panel_float(const PanelCall&);      \
  void panel_bfloat16(const PanelCall&);   \
  void panel_int8(const PanelCall&);       \
  void panel_int4(const PanelCall&);       \
  void row_float(const RowCall&);          \
  void row_bfloat16(const RowCall&);       \
  }
REMORA_DECLARE(portable)
REMORA_DECLARE(avx2)
REMORA_DECLARE(avx512)
REMORA_DECLARE(avx512_bf16)
#undef REMORA_DECLARE

}  // namespace remora
