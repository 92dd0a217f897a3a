// Ops over packed weights: packed_linear, grouped_linear. See panel.h for
// the layout and for why a row's result depends on that row only.
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "packed_shape.h"
#include "panel.h"
#include "phase.h"
#include "task_runs.h"
#include "team.h"
#include "weight_format.h"

namespace remora {
namespace {

// Sizes that segments have in common.
struct Shape : PackedShape {
  int64_t x_stride;  // elements
};

// Rows that share one packed weight.
struct Segment {
  const Shape* shape;
  const char* x;
  char* out;
  int64_t num_rows;
  const char* weights;
  const char* bias;  // or null
};

struct Task {
  int32_t segment;
  int32_t group;
  int64_t row;
};

// `next`: the weights that this thread reads afterwards, or null.
void run_task(const Segment& segment, const Task& task, const void* next, PanelKernel kernel) {
  const Shape& shape = *segment.shape;
  const int64_t size = shape.element_size();
  PanelCall call = shape.group_call(task.group, segment.weights, segment.bias);
  call.x = segment.x + task.row * shape.x_stride * size;
  call.x_stride = shape.x_stride;
  call.num_rows = std::min(kRowBlock, segment.num_rows - task.row);
  call.out = segment.out + (task.row * shape.num_outputs + task.group * kGroup) * size;
  call.out_stride = shape.num_outputs;
  call.next = next;
  kernel(call);
}

// Which thread computes an element changes no bit.
void run_segments(const std::vector<Segment>& segments) {
  if (segments.empty()) return;
  std::vector<Task> tasks;
  int64_t macs = 0;
  int64_t bytes = 0;
  for (size_t s = 0; s < segments.size(); ++s) {
    const Shape& shape = *segments[s].shape;
    macs += segments[s].num_rows * shape.num_inputs * shape.num_outputs;
    bytes += shape.packed_nbytes();
    for (int64_t group = 0; group < shape.num_groups(); ++group) {
      for (int64_t row = 0; row < segments[s].num_rows; row += kRowBlock) {
        tasks.push_back({static_cast<int32_t>(s), static_cast<int32_t>(group), row});
      }
    }
  }
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const PanelKernel kernel = panel_kernel(segments[0].shape->format);
  const int num_workers = team_workers(bytes + macs / kMacsPerByte, num_tasks);
  TaskRuns runs(num_tasks, num_workers);
  team_run(num_workers, [&](int worker) {
    for (auto taken = runs.take(worker); taken.task >= 0; taken = runs.take(worker)) {
      const Task& task = tasks[taken.task];
      const void* next = nullptr;
      if (taken.next >= 0) {
        const Task& after = tasks[taken.next];
        const Segment& segment = segments[after.segment];
        next = segment.weights + segment.shape->group_offset(after.group);
      }
      run_task(segments[task.segment], task, next, kernel);
    }
  });
}

// The rows as [N, padded_inputs] with unit stride inside a row; copies only where it must.
at::Tensor usable_rows(const at::Tensor& x, const Shape& shape) {
  at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, shape.num_inputs});
  if (shape.padded_inputs() != shape.num_inputs) {
    return at::constant_pad_nd(rows, {0, shape.padded_inputs() - shape.num_inputs}).contiguous();
  }
  return rows.stride(1) == 1 || shape.num_inputs == 1 ? rows : rows.contiguous();
}

struct Weight {
  const at::Tensor& packed;
  const std::optional<at::Tensor>& bias;
  int64_t num_outputs;
};

// The same rows times several packed weights, in one region of the team.
template <size_t kCount>
std::array<at::Tensor, kCount> linears(const at::Tensor& x, const Weight (&weights)[kCount]) {
  const PhaseTimer timer(Phase::kLinear);
  TORCH_CHECK(x.dim() >= 1, "x must be [..., K]");
  std::array<at::Tensor, kCount> outs;
  std::array<Shape, kCount> shapes;
  auto sizes = x.sizes().vec();
  for (size_t i = 0; i < kCount; ++i) {
    const Weight& weight = weights[i];
    shapes[i] = {{x.size(-1), weight.num_outputs, weight_format(x.scalar_type(), {})}, 0};
    const at::Tensor& packed = weight.packed;
    TORCH_CHECK(fits(packed, shapes[i], 1),
                "packed weight of ", packed.numel(), " ", packed.scalar_type(),
                " does not fit x [..., ", x.size(-1), "] ", x.scalar_type(), " and ",
                weight.num_outputs, " outputs");
    check_bias(weight.bias, x, weight.num_outputs);
    sizes.back() = weight.num_outputs;
    outs[i] = at::empty(sizes, x.options());
  }
  if (outs[0].numel() == 0) return outs;
  const at::Tensor rows = usable_rows(x, shapes[0]);
  std::vector<Segment> segments;
  for (size_t i = 0; i < kCount; ++i) {
    shapes[i].x_stride = rows.stride(0);
    segments.push_back({&shapes[i], byte_pointer(rows),
                        static_cast<char*>(outs[i].mutable_data_ptr()), rows.size(0),
                        byte_pointer(weights[i].packed),
                        weights[i].bias.has_value() ? byte_pointer(*weights[i].bias) : nullptr});
  }
  run_segments(segments);
  return outs;
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed,
                         const std::optional<at::Tensor>& bias, int64_t num_outputs) {
  return linears(x, {{packed, bias, num_outputs}})[0];
}

std::tuple<at::Tensor, at::Tensor> packed_linear_2(
    const at::Tensor& x, const at::Tensor& packed_a, const std::optional<at::Tensor>& bias_a,
    int64_t num_outputs_a, const at::Tensor& packed_b, const std::optional<at::Tensor>& bias_b,
    int64_t num_outputs_b) {
  auto outs = linears(x, {{packed_a, bias_a, num_outputs_a}, {packed_b, bias_b, num_outputs_b}});
  return {outs[0], outs[1]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_linear_3(
    const at::Tensor& x, const at::Tensor& packed_a, const std::optional<at::Tensor>& bias_a,
    int64_t num_outputs_a, const at::Tensor& packed_b, const std::optional<at::Tensor>& bias_b,
    int64_t num_outputs_b, const at::Tensor& packed_c, const std::optional<at::Tensor>& bias_c,
    int64_t num_outputs_c) {
  auto outs = linears(x, {{packed_a, bias_a, num_outputs_a},
                          {packed_b, bias_b, num_outputs_b},
                          {packed_c, bias_c, num_outputs_c}});
  return {outs[0], outs[1], outs[2]};
}

at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& packed,
                          const std::optional<at::Tensor>& bias, const at::Tensor& offsets,
                          int64_t num_outputs, std::optional<std::string_view> quantized) {
  const PhaseTimer timer(Phase::kExperts);
  TORCH_CHECK(x.dim() == 2 && packed.dim() >= 2, "x must be [N, K], packed [S, ...]");
  const int64_t num_slots = packed.size(0);
  Shape shape{{x.size(1), num_outputs, weight_format(x.scalar_type(), quantized)}, 0};
  TORCH_CHECK(fits(packed, shape, num_slots),
              "packed weights of ", packed.numel(), " ", packed.scalar_type(), " do not fit x [N, ",
              shape.num_inputs, "] ", x.scalar_type(), ", ", num_slots, " slots and ", num_outputs,
              " outputs");
  check_bias(bias, x, num_slots * num_outputs);
  TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) == num_slots + 1,
              "offsets must be [S + 1] = [", num_slots + 1, "], got ", offsets.sizes());
  const at::Tensor bounds = offsets.to(at::kLong).contiguous();
  const int64_t* bound = bounds.const_data_ptr<int64_t>();
  const int64_t num_rows = x.size(0);
  TORCH_CHECK(bound[0] == 0 && bound[num_slots] <= num_rows, "offsets must run from 0 to at most ",
              num_rows, ", got ", bound[0], "..", bound[num_slots]);

  at::Tensor out = at::empty({num_rows, num_outputs}, x.options());
  const at::Tensor rows = usable_rows(x, shape);
  shape.x_stride = rows.stride(0);
  const int64_t size = shape.element_size();
  char* out_bytes = static_cast<char*>(out.mutable_data_ptr());
  std::vector<Segment> segments;
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    TORCH_CHECK(bound[slot] <= bound[slot + 1], "offsets decrease after slot ", slot);
    if (bound[slot] == bound[slot + 1]) continue;
    segments.push_back(
        {&shape, byte_pointer(rows) + bound[slot] * shape.x_stride * size,
         out_bytes + bound[slot] * num_outputs * size, bound[slot + 1] - bound[slot],
         byte_pointer(packed) + slot * shape.packed_nbytes(),
         bias.has_value() ? byte_pointer(*bias) + slot * num_outputs * size : nullptr});
  }
  const int64_t num_used = bound[num_slots];
  std::fill(out_bytes + num_used * num_outputs * size, out_bytes + num_rows * num_outputs * size, 0);
  run_segments(segments);
  return out;
}

}  // namespace
}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("packed_linear(Tensor x, Tensor packed, Tensor? bias, int num_outputs) -> Tensor", tags);
  m.def("packed_linear_2(Tensor x, Tensor packed_a, Tensor? bias_a, int num_outputs_a, "
        "Tensor packed_b, Tensor? bias_b, int num_outputs_b) -> (Tensor, Tensor)", tags);
  m.def("packed_linear_3(Tensor x, Tensor packed_a, Tensor? bias_a, int num_outputs_a, "
        "Tensor packed_b, Tensor? bias_b, int num_outputs_b, "
        "Tensor packed_c, Tensor? bias_c, int num_outputs_c) -> (Tensor, Tensor, Tensor)", tags);
  m.def("grouped_linear(Tensor x, Tensor packed, Tensor? bias, Tensor offsets, int num_outputs,"
        " str? quantized=None) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(remora, CPU, m) {
  m.impl("packed_linear", &remora::packed_linear);
  m.impl("packed_linear_2", &remora::packed_linear_2);
  m.impl("packed_linear_3", &remora::packed_linear_3);
  m.impl("grouped_linear", &remora::grouped_linear);
}
