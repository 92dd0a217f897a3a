// What stands between an expert's two linears, element by element, in float32, rounded once:
//
//   out = min(act(min(gate, gate_max)), act_max) * (clamp(up, -up_max, up_max) + up_shift)
//
// without a gate: out = min(act(up), act_max). Bounds may be infinite. Element by element: a row, and
// where it stands, does not matter.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>

namespace remora {

enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };

// Columns of the first linear: gates then ups, in turn (gate0, up0, gate1, ...), or no gates.
enum class GateLayout : int32_t { kConcatenated = 0, kInterleaved = 1, kNone = 2 };

struct Gate {
  Activation activation;
  GateLayout layout;
  float alpha;  // silu is gate / (1 + exp(-alpha * gate))
  float gate_max;
  float up_max;
  float act_max;
  float up_shift;

  // Columns of the first linear for one of the second.
  int64_t columns() const { return layout == GateLayout::kNone ? 1 : 2; }
};

// From what Python passes: numbers are alpha, gate_max, up_max, act_max, up_shift.
Gate gate_of(int64_t activation, int64_t layout, c10::ArrayRef<double> numbers);

// num_rows rows of columns() * width values to rows of `width`; bfloat16 or float32, strides in
// elements.
void gate_rows(const Gate& gate, bool bfloat16, const void* up, int64_t up_stride, void* out,
               int64_t out_stride, int64_t num_rows, int64_t width);

}  // namespace remora
