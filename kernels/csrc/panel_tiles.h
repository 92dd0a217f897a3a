// Register tiles of rows x panels, shared by the instruction sets. No include guard: each of them
// includes this once, inside its own namespace, with REMORA_TARGET defined to its function attribute.
//
// `Simd` provides Scalar, Vec (16 float32), Weights (16 columns of one step), and static functions
// zero, load_weights, load_x, dot (one step into an accumulator), add_bias, store;
// kScalarsPerStep: k values of one step; kRows: of the tallest tile, and how many panels go beside so
// many rows; kRowsHeld: up to so many, their values of a step stay in registers. kPrefetches, to
// kPrefetchLevel; kAsksForNextGroup. Stored is what weights are stored as, Input what rows are; where
// weights are scaled (kScaled), `scale` multiplies the sums. A step may be taken in several parts
// (kParts), each with kScalarsPerStep / kParts k: load_weights is told which.

template <class Simd>
REMORA_INLINE typename Simd::Weights weights_of(const typename Simd::Stored* w, int part) {
  if constexpr (Simd::kParts > 1) {
    return Simd::load_weights(w, part);
  } else {
    return Simd::load_weights(w);
  }
}

template <class Scalar>
REMORA_INLINE const Scalar* row_of(const PanelCall& call, int64_t row) {
  return call.x_rows != nullptr ? static_cast<const Scalar*>(call.x_rows[row])
                                : static_cast<const Scalar*>(call.x) + row * call.x_stride;
}

// Scale, bias and one rounding of a tile's sums.
template <class Simd, int kR, int kP>
REMORA_INLINE void finish(const PanelCall& call, int64_t row, int first_panel,
                          typename Simd::Vec (&acc)[kR][kP]) {
  using Scalar = typename Simd::Scalar;
  const Scalar* bias = static_cast<const Scalar*>(call.bias);
  Scalar* out[kR];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
    out[r] = call.out_rows != nullptr
                 ? static_cast<Scalar*>(call.out_rows[row + r]) + call.out_column
                 : static_cast<Scalar*>(call.out) + (row + r) * call.out_stride;
  }
#pragma GCC unroll 8
  for (int p = 0; p < kP; ++p) {
    const int64_t column = (first_panel + p) * kPanel;
    const int left = static_cast<int>(call.num_columns - column);
    const int count = left < kPanel ? left : static_cast<int>(kPanel);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      if constexpr (Simd::kScaled) acc[r][p] = Simd::scale(acc[r][p], call.scale + column, count);
      if (bias != nullptr) acc[r][p] = Simd::add_bias(acc[r][p], bias + column, count);
      Simd::store(out[r] + column, acc[r][p], count);
    }
  }
}

// Not inlined: among others the compiler finds fewer registers for it.
template <class Simd, int kR, int kP>
__attribute__((noinline)) REMORA_TARGET void tile(const PanelCall& call, int64_t row, int first_panel) {
  using Input = typename Simd::Input;
  const Input* x[kR];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) x[r] = row_of<Input>(call, row + r);
  using Stored = typename Simd::Stored;
  const int64_t step_stride = call.num_panels * kPanel * Simd::kScalarsPerStep;
  const Stored* w = static_cast<const Stored*>(call.weights) +
                    first_panel * kPanel * Simd::kScalarsPerStep;
  typename Simd::Vec acc[kR][kP];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p) acc[r][p] = Simd::zero();
  }
  // Weights are asked for early, those of the next group where this one ends: a stream of memory
  // that stops and starts costs a latency each time. Where a group takes several passes, each asks
  // for its share of the next group, so that memory is read in one sequence while they compute.
  const bool passes = Simd::kAsksForNextGroup && kP < call.num_panels && call.next != nullptr;
  const int64_t ahead_steps = passes ? 0 : kAheadBytes / (step_stride * sizeof(Stored));
  const int64_t num_inner = call.num_steps > ahead_steps ? call.num_steps - ahead_steps : 0;
  const int64_t ahead_stride = passes ? kP * kPanel * Simd::kScalarsPerStep : step_stride;
  const Stored* ahead = w + (call.num_steps - num_inner) * step_stride;
  const Stored* next = call.next == nullptr ? ahead : static_cast<const Stored*>(call.next);
  if (passes) ahead = next + first_panel * kPanel * Simd::kScalarsPerStep * call.num_steps;
  for (int run = 0; run < 2; ++run) {
    const int64_t end = run == 0 ? num_inner : call.num_steps;
    for (int64_t step = run == 0 ? 0 : num_inner; step < end; ++step) {
#pragma GCC unroll 2
      for (int part = 0; part < Simd::kParts; ++part) {
        const int64_t k = (step * Simd::kParts + part) * (Simd::kScalarsPerStep / Simd::kParts);
        if constexpr (kR <= Simd::kRowsHeld) {  // weights of one panel at a time: fewest registers
          using Value = decltype(Simd::load_x(x[0]));
          Value values[kR];
#pragma GCC unroll 8
          for (int r = 0; r < kR; ++r) values[r] = Simd::load_x(x[r] + k);
#pragma GCC unroll 8
          for (int p = 0; p < kP; ++p) {
            const int64_t offset = p * kPanel * Simd::kScalarsPerStep;
            const typename Simd::Weights column = weights_of<Simd>(w + offset, part);
            if constexpr (Simd::kPrefetches) {
              if (part == 0) __builtin_prefetch(ahead + offset, 0, Simd::kPrefetchLevel);
            }
#pragma GCC unroll 8
            for (int r = 0; r < kR; ++r) acc[r][p] = Simd::dot(acc[r][p], values[r], column);
          }
        } else {
          typename Simd::Weights columns[kP];
#pragma GCC unroll 8
          for (int p = 0; p < kP; ++p) {
            const int64_t offset = p * kPanel * Simd::kScalarsPerStep;
            columns[p] = weights_of<Simd>(w + offset, part);
            if constexpr (Simd::kPrefetches) {
              if (part == 0) __builtin_prefetch(ahead + offset, 0, Simd::kPrefetchLevel);
            }
          }
#pragma GCC unroll 8
          for (int r = 0; r < kR; ++r) {
            const auto value = Simd::load_x(x[r] + k);
#pragma GCC unroll 8
            for (int p = 0; p < kP; ++p) acc[r][p] = Simd::dot(acc[r][p], value, columns[p]);
          }
        }
      }
      w += step_stride;
      ahead += ahead_stride;
    }
    ahead = next;
  }
  finish<Simd, kR, kP>(call, row, first_panel, acc);
}

template <class Simd, int kR>
REMORA_TARGET void tile_panels(const PanelCall& call, int64_t row) {
  constexpr int kP = Simd::panels(kR);
  int panel = 0;
  for (; panel + kP <= call.num_panels; panel += kP) tile<Simd, kR, kP>(call, row, panel);
  switch (call.num_panels - panel) {
    case 3:
      if constexpr (kP > 3) tile<Simd, kR, 3>(call, row, panel);
      break;
    case 2:
      if constexpr (kP > 2) tile<Simd, kR, 2>(call, row, panel);
      break;
    case 1:
      if constexpr (kP > 1) tile<Simd, kR, 1>(call, row, panel);
      break;
    default:
      break;
  }
}

// Rows in tiles of nearly equal height, at most Simd::kRows: eight rows are 4 + 4, not 6 + 2.
template <class Simd>
REMORA_TARGET void panel_rows(const PanelCall& call) {
  const int64_t num_tiles = (call.num_rows + Simd::kRows - 1) / Simd::kRows;
  int64_t row = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const int64_t height = (call.num_rows - row + num_tiles - i - 1) / (num_tiles - i);
    switch (height) {
      case 6:
        if constexpr (Simd::kRows >= 6) tile_panels<Simd, 6>(call, row);
        break;
      case 5:
        if constexpr (Simd::kRows >= 5) tile_panels<Simd, 5>(call, row);
        break;
      case 4:
        if constexpr (Simd::kRows >= 4) tile_panels<Simd, 4>(call, row);
        break;
      case 3:
        if constexpr (Simd::kRows >= 3) tile_panels<Simd, 3>(call, row);
        break;
      case 2:
        tile_panels<Simd, 2>(call, row);
        break;
      default:
        tile_panels<Simd, 1>(call, row);
        break;
    }
    row += height;
  }
}
