// See gates.h. A row goes through in pieces that stay in the first cache: widened, activated,
// multiplied and rounded by loops simple enough for the compiler to vectorise.
#include "gates.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "phase.h"
#include "scalar.h"
#include "team.h"

namespace remora {
namespace {

constexpr int64_t kPiece = 256;              // elements
constexpr int64_t kGrainElements = 1 << 14;  // of work for one thread

template <class S>
inline void read_body(const S* source, int64_t step, float* target, int64_t count) {
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = widen(source[2 * i]);
  }
}
REMORA_CLONES void read(const float* source, int64_t step, float* target, int64_t count) {
  read_body(source, step, target, count);
}
REMORA_CLONES void read(const uint16_t* source, int64_t step, float* target, int64_t count) {
  read_body(source, step, target, count);
}

REMORA_CLONES void limit(float* values, float low, float high, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i] < low ? low : values[i];
    values[i] = value > high ? high : value;
  }
}

REMORA_CLONES void silu(float* values, float alpha, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = values[i];
    values[i] = g / (1.0f + exponential(-(alpha * g)));
  }
}

// Abramowitz and Stegun 7.1.26: erf within 1.5e-7.
REMORA_CLONES void gelu(float* values, float, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = values[i] * 0.70710678118654752f;
    const float positive = x < 0.0f ? -x : x;
    const float t = 1.0f / (1.0f + 0.3275911f * positive);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float tail = p * t * exponential(-(x * x));  // 1 - erf(|x|)
    values[i] = 0.5f * values[i] * (x < 0.0f ? tail : 2.0f - tail);
  }
}

// 0.5 g (1 + tanh(y)) is g / (1 + exp(-2y)).
REMORA_CLONES void gelu_tanh(float* values, float, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = values[i];
    const float y = 0.79788456080286536f * (g + 0.044715f * (g * g * g));
    values[i] = g / (1.0f + exponential(-2.0f * y));
  }
}

REMORA_CLONES void relu(float* values, float, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];
}

REMORA_CLONES void relu2(float* values, float, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = values[i] < 0.0f ? 0.0f : values[i];
    values[i] = g * g;
  }
}

REMORA_CLONES void multiply(float* values, const float* ups, float shift, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= ups[i] + shift;
}

REMORA_CLONES void write(const float* values, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(values[i], target + i);
}
REMORA_CLONES void write(const float* values, uint16_t* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(values[i], target + i);
}

constexpr void (*kActivations[])(float*, float, int64_t) = {silu, gelu, gelu_tanh, relu, relu2};

template <class S>
void gate_row(const Gate& gate, const S* row, S* out, int64_t width) {
  const bool interleaved = gate.layout == GateLayout::kInterleaved;
  const int64_t step = interleaved ? 2 : 1;
  const S* ups = row + (interleaved ? 1 : width);
  float values[kPiece];
  float factors[kPiece];
  for (int64_t begin = 0; begin < width; begin += kPiece) {
    const int64_t count = std::min(kPiece, width - begin);
    read(row + begin * step, step, values, count);
    if (std::isfinite(gate.gate_max)) limit(values, -INFINITY, gate.gate_max, count);
    kActivations[static_cast<int32_t>(gate.activation)](values, gate.alpha, count);
    if (std::isfinite(gate.act_max)) limit(values, -INFINITY, gate.act_max, count);
    if (gate.layout != GateLayout::kNone) {
      read(ups + begin * step, step, factors, count);
      if (std::isfinite(gate.up_max)) limit(factors, -gate.up_max, gate.up_max, count);
      multiply(values, factors, gate.up_shift, count);
    }
    write(values, out + begin, count);
  }
}

template <class S>
void gate_typed(const Gate& gate, const void* up, int64_t up_stride, void* out, int64_t out_stride,
                int64_t num_rows, int64_t width) {
  for (int64_t row = 0; row < num_rows; ++row) {
    gate_row(gate, static_cast<const S*>(up) + row * up_stride,
             static_cast<S*>(out) + row * out_stride, width);
  }
}

at::Tensor expert_gate(const at::Tensor& up, int64_t activation, int64_t layout,
                       at::ArrayRef<double> numbers) {
  const PhaseTimer timer(Phase::kActivation);
  const Gate gate = gate_of(activation, layout, numbers);
  const bool bfloat16 = up.scalar_type() == at::kBFloat16;
  TORCH_CHECK(up.dim() >= 1 && up.size(-1) % gate.columns() == 0 &&
                  (bfloat16 || up.scalar_type() == at::kFloat),
              "rows must be [..., ", gate.columns(), "I], bfloat16 or float32, got ", up.sizes(), " ",
              up.scalar_type());
  auto sizes = up.sizes().vec();
  const int64_t columns = sizes.back();
  const int64_t width = columns / gate.columns();
  sizes.back() = width;
  at::Tensor out = at::empty(sizes, up.options());
  if (out.numel() == 0) return out;
  const at::Tensor source = up.contiguous();
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = up.element_size();
  team_for(out.numel() / width, std::max<int64_t>(1, kGrainElements / width),
           [&](int64_t begin, int64_t end) {
             gate_rows(gate, bfloat16, from + begin * columns * size, columns,
                       to + begin * width * size, width, end - begin, width);
           });
  return out;
}

}  // namespace

void gate_rows(const Gate& gate, bool bfloat16, const void* up, int64_t up_stride, void* out,
               int64_t out_stride, int64_t num_rows, int64_t width) {
  (bfloat16 ? gate_typed<uint16_t> : gate_typed<float>)(gate, up, up_stride, out, out_stride,
                                                        num_rows, width);
}

Gate gate_of(int64_t activation, int64_t layout, at::ArrayRef<double> numbers) {
  TORCH_CHECK(activation >= 0 && activation <= 4 && layout >= 0 && layout <= 2 && numbers.size() == 5,
              "no such gate: activation ", activation, ", layout ", layout, ", ", numbers.size(),
              " numbers");
  return {static_cast<Activation>(activation), static_cast<GateLayout>(layout),
          static_cast<float>(numbers[0]),      static_cast<float>(numbers[1]),
          static_cast<float>(numbers[2]),      static_cast<float>(numbers[3]),
          static_cast<float>(numbers[4])};
}

}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  // numbers: alpha, gate_max, up_max, act_max, up_shift (gates.h)
  m.def("expert_gate(Tensor up, int activation, int layout, float[] numbers) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(remora, CPU, m) { m.impl("expert_gate", &remora::expert_gate); }
