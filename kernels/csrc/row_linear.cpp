// row_linear: rows times an ordinary weight [O, K], a router's.
//
// Most machines take dot products of rows with rows (row_tiles.h). On tiles both operands change
// places: the weight's rows lie as a tile wants rows, and up to 64 rows of x are packed as weights
// are, which costs a transposition of what the first caches hold. Sums are those of packed_linear
// then, bit for bit, since a product does not depend on who is first.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "buffer.h"
#include "packed_shape.h"
#include "panel.h"
#include "phase.h"
#include "team.h"
#include "weight_format.h"

namespace remora {
namespace {

constexpr int64_t kDotRowBlock = 8;     // rows of one task: two tiles
constexpr int64_t kStepBlock = 16;      // steps that are transposed together: lines that stay in the first cache

struct Rows {
  const char* first;
  int64_t stride;  // bytes between rows
  int64_t count;
};

struct Problem {
  Rows x;
  Rows weight;
  int64_t num_inputs;
  const char* bias;  // or null
  char* out;         // [rows of x, rows of weight]
  bool bfloat16;
};

// Rows as the columns of one packed group: words (two k) [step][column], zeros behind the last row.
void pack_rows(const Rows& rows, int64_t num_steps, int64_t num_columns, char* target) {
  constexpr int64_t kWord = 4;
  if (rows.count < num_columns) std::memset(target, 0, num_steps * num_columns * kWord);
  for (int64_t first = 0; first < num_steps; first += kStepBlock) {
    const int64_t end = std::min(num_steps, first + kStepBlock);
    for (int64_t row = 0; row < rows.count; ++row) {
      const char* from = rows.first + row * rows.stride;
      for (int64_t step = first; step < end; ++step) {
        std::memcpy(target + (step * num_columns + row) * kWord, from + step * kWord, kWord);
      }
    }
  }
}

void tiled_block(const Problem& p, int64_t first, int64_t count, PanelKernel kernel) {
  thread_local Buffer scratch;
  const int64_t num_outputs = p.weight.count;
  const PackedShape shape{p.num_inputs, count, WeightFormat::kBFloat16};
  const int64_t packed_bytes = shape.packed_nbytes();
  constexpr int64_t kSize = 2;
  char* packed = scratch.take(packed_bytes + num_outputs * kGroup * kSize);
  TORCH_CHECK(packed != nullptr, "no memory for ", count, " rows of ", p.num_inputs);
  pack_rows({p.x.first + first * p.x.stride, p.x.stride, count}, shape.num_steps(),
            shape.num_panels() * kPanel, packed);
  PanelCall call = shape.group_call(0, packed, nullptr);
  uint16_t* turned = reinterpret_cast<uint16_t*>(packed + packed_bytes);  // [O][kGroup]
  call.x = p.weight.first;
  call.x_stride = p.weight.stride / kSize;
  call.num_rows = num_outputs;
  call.out = turned;
  call.out_stride = kGroup;
  kernel(call);
  uint16_t* out = reinterpret_cast<uint16_t*>(p.out) + first * num_outputs;
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t o = 0; o < num_outputs; ++o) out[row * num_outputs + o] = turned[o * kGroup + row];
  }
}

void dot_block(const Problem& p, int64_t first, int64_t count, RowKernel kernel) {
  const int64_t size = p.bfloat16 ? 2 : 4;
  kernel({p.x.first + first * p.x.stride, p.x.stride / size, count, p.weight.first,
          p.weight.stride / size, p.weight.count, p.num_inputs, p.bias,
          p.out + first * p.weight.count * size, p.weight.count});
}

void run(const Problem& p) {
  // A bias would have to be added before the one rounding, by columns that are rows there.
  const bool tiled = p.bfloat16 && panel_is_tiled(WeightFormat::kBFloat16) && p.bias == nullptr &&
                     p.num_inputs % 2 == 0;
  const int64_t block = tiled ? kGroup : kDotRowBlock;
  const PanelKernel panel = tiled ? panel_kernel(WeightFormat::kBFloat16) : nullptr;
  const RowKernel dot = row_kernel(p.bfloat16);
  const int64_t num_blocks = (p.x.count + block - 1) / block;
  const int64_t cost_per_row = std::max<int64_t>(1, p.num_inputs * p.weight.count / kMacsPerByte);
  std::atomic<int64_t> next{0};
  team_run(team_workers(p.x.count * cost_per_row, num_blocks), [&](int) {
    for (int64_t i = next.fetch_add(1); i < num_blocks; i = next.fetch_add(1)) {
      const int64_t first = i * block;
      const int64_t count = std::min(block, p.x.count - first);
      if (tiled) {
        tiled_block(p, first, count, panel);
      } else {
        dot_block(p, first, count, dot);
      }
    }
  });
}

at::Tensor row_linear(const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias) {
  const PhaseTimer timer(Phase::kRowLinear);
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == x.size(-1),
              "weight ", weight.sizes(), " does not fit x ", x.sizes());
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must be ", x.scalar_type(), ", got ",
              weight.scalar_type());
  const int64_t num_inputs = weight.size(1);
  const int64_t num_outputs = weight.size(0);
  check_bias(bias, x, num_outputs);
  const bool bfloat16 = weight_format(x.scalar_type(), {}) == WeightFormat::kBFloat16;
  auto sizes = x.sizes().vec();
  sizes.back() = num_outputs;
  at::Tensor out = at::empty(sizes, x.options());
  if (out.numel() == 0) return out;
  at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, num_inputs});
  if (num_inputs > 1 && rows.stride(1) != 1) rows = rows.contiguous();
  const at::Tensor weights = num_inputs > 1 && weight.stride(1) != 1 ? weight.contiguous() : weight;
  const int64_t size = bfloat16 ? 2 : 4;
  run({{byte_pointer(rows), rows.stride(0) * size, rows.size(0)},
       {byte_pointer(weights), weights.stride(0) * size, num_outputs},
       num_inputs,
       bias.has_value() ? byte_pointer(*bias) : nullptr,
       static_cast<char*>(out.mutable_data_ptr()),
       bfloat16});
  return out;
}

}  // namespace
}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("row_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(remora, CPU, m) { m.impl("row_linear", &remora::row_linear); }
