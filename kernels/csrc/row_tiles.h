// Dot products of rows with rows of an ordinary weight [O, K], shared by the instruction sets. No
// include guard: as panel_tiles.h.
//
// One register of partial sums per element: lane l takes the k of its place in each run of kLanes
// values, in ascending order; the lanes are summed in one fixed order at the end.
//
// `Simd` provides, beside Scalar, Vec, zero: kLanes, kDotRows, kDotOutputs, dot_lanes (acc, x, w,
// count <= kLanes), sum, widen and narrow (one value to and from float32).

template <class Simd, int kR, int kO>
REMORA_TARGET void dot_tile(const RowCall& call, int64_t row, int64_t output) {
  using Scalar = typename Simd::Scalar;
  const Scalar* x = static_cast<const Scalar*>(call.x) + row * call.x_stride;
  const Scalar* w = static_cast<const Scalar*>(call.weights) + output * call.weight_stride;
  typename Simd::Vec acc[kR][kO];
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int o = 0; o < kO; ++o) acc[r][o] = Simd::zero();
  }
  for (int64_t k = 0; k < call.num_inputs; k += Simd::kLanes) {
    const int64_t left = call.num_inputs - k;
    const int count = left < Simd::kLanes ? static_cast<int>(left) : Simd::kLanes;
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int o = 0; o < kO; ++o) {
        acc[r][o] = Simd::dot_lanes(acc[r][o], x + r * call.x_stride + k,
                                    w + o * call.weight_stride + k, count);
      }
    }
  }
  const Scalar* bias = static_cast<const Scalar*>(call.bias);
  Scalar* out = static_cast<Scalar*>(call.out) + row * call.out_stride + output;
  for (int r = 0; r < kR; ++r) {
    for (int o = 0; o < kO; ++o) {
      float value = Simd::sum(acc[r][o]);
      if (bias != nullptr) value += Simd::widen(bias[output + o]);
      Simd::narrow(value, out + r * call.out_stride + o);
    }
  }
}

template <class Simd, int kR>
REMORA_TARGET void dot_outputs(const RowCall& call, int64_t row) {
  int64_t output = 0;
  for (; output + Simd::kDotOutputs <= call.num_outputs; output += Simd::kDotOutputs) {
    dot_tile<Simd, kR, Simd::kDotOutputs>(call, row, output);
  }
  for (; output < call.num_outputs; ++output) dot_tile<Simd, kR, 1>(call, row, output);
}

template <class Simd>
REMORA_TARGET void dot_rows(const RowCall& call) {
  int64_t row = 0;
  for (; row + Simd::kDotRows <= call.num_rows; row += Simd::kDotRows) {
    dot_outputs<Simd, Simd::kDotRows>(call, row);
  }
  for (; row < call.num_rows; ++row) dot_outputs<Simd, 1>(call, row);
}
