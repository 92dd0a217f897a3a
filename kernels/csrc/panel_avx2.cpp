// AVX2 tiles: float32, and narrower weights widened in registers for few rows, once for many.
//
// Sixteen registers hold 12 accumulators of float32 tiles, or 8 where weights are widened beside
// them, anew for every four rows. For many rows a group is widened into the second cache first, and
// rows six at a time. Sums run in the same order either way.
#include "panel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "buffer.h"
#include "int4.h"

#define REMORA_TARGET __attribute__((target("avx2,fma")))

namespace remora::avx2 {
namespace {

#include "simd_avx2.h"

#include "panel_tiles.h"

#include "row_tiles.h"

constexpr int64_t kWideRows = 12;
constexpr int64_t kWideRowsInt8 = 5;

// Rows and weights in float32, outputs and bias of S.
template <class S>
struct FloatTiles : Avx2<S> {
  using Input = float;
  using Stored = float;
  using Weights = Lanes;
  static constexpr int kScalarsPerStep = 1;
  static constexpr int kRows = 6;
  REMORA_INLINE Weights load_weights(const float* w) { return load_lanes(w, 16); }
  REMORA_INLINE __m256 load_x(const float* x) { return _mm256_broadcast_ss(x); }
  REMORA_INLINE Lanes dot(const Lanes& acc, __m256 x, const Weights& w) {
    return multiply_add(x, w, acc);
  }
};

struct Float : FloatTiles<float> {
  static constexpr int panels(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
};

// Rows and weights widened before (panel_widened_rows).
struct Widened : FloatTiles<uint16_t> {
  static constexpr bool kPrefetches = false;  // they come from the caches
  static constexpr int panels(int) { return 1; }
};

struct WidenedScaled : Widened {
  static constexpr bool kScaled = true;
};

struct Pair {
  __m256 even;
  __m256 odd;
};

REMORA_INLINE Pair split(__m256i pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)))};
}

REMORA_INLINE __m256i load_bytes(const void* source) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(source));
}

// Two k of sixteen columns.
struct PairWeights {
  Lanes even;
  Lanes odd;
};

struct BFloat16 : Avx2<uint16_t> {
  using Weights = PairWeights;
  static constexpr int kScalarsPerStep = 2;
  static constexpr int kRows = 4;
  static constexpr int panels(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
  REMORA_INLINE Weights load_weights(const uint16_t* w) {
    const Pair low = split(load_bytes(w));
    const Pair high = split(load_bytes(w + 16));
    return {{low.even, high.even}, {low.odd, high.odd}};
  }
  REMORA_INLINE Pair load_x(const uint16_t* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return split(_mm256_set1_epi32(pair));
  }
  REMORA_INLINE Vec dot(const Vec& acc, const Pair& x, const Weights& w) {
    return multiply_add(x.odd, w.odd, multiply_add(x.even, w.even, acc));
  }
};

struct QuadWeights {
  Lanes k[4];
};

struct QuadX {
  __m256 k[4];
};

struct Int8 : Avx2<uint16_t> {
  using Stored = uint8_t;
  using Weights = QuadWeights;
  static constexpr bool kScaled = true;
  static constexpr int kScalarsPerStep = 4;
  static constexpr int kRows = 4;
  static constexpr int panels(int rows) { return rows == 1 ? 2 : 1; }
  REMORA_INLINE Weights load_weights(const uint8_t* w) {
    Weights result;
    widen_half(w, result, &Lanes::low);
    widen_half(w + 32, result, &Lanes::high);
    return result;
  }
  REMORA_INLINE void widen_half(const uint8_t* w, Weights& to, __m256 Lanes::*half) {
    const __m256i bytes = load_bytes(w);
    const __m256i value =
        _mm256_sign_epi8(_mm256_and_si256(bytes, _mm256_set1_epi8(0x7f)), bytes);
    // A column's two values of one half, each in the upper byte of a 16-bit word.
    const __m256i first = _mm256_unpacklo_epi8(_mm256_setzero_si256(), value);
    const __m256i second = _mm256_unpackhi_epi8(_mm256_setzero_si256(), value);
    to.k[0].*half = even(first);
    to.k[1].*half = odd(first);
    to.k[2].*half = even(second);
    to.k[3].*half = odd(second);
  }
  REMORA_INLINE __m256 even(__m256i words) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 16), 24));
  }
  REMORA_INLINE __m256 odd(__m256i words) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 24));
  }
  REMORA_INLINE QuadX load_x(const uint16_t* x) {
    const Pair first = BFloat16::load_x(x);
    const Pair second = BFloat16::load_x(x + 2);
    return {{first.even, first.odd, second.even, second.odd}};
  }
  REMORA_INLINE Vec dot(Vec acc, const QuadX& x, const Weights& w) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) acc = multiply_add(x.k[k], w.k[k], acc);
    return acc;
  }
};

REMORA_INLINE void put_steps(float* to, int64_t stride, const PairWeights& w) {
  store_sixteen(to, w.even);
  store_sixteen(to + stride, w.odd);
}

REMORA_INLINE void put_steps(float* to, int64_t stride, const QuadWeights& w) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) store_sixteen(to + k * stride, w.k[k]);
}

// A group as float32 tiles hold it: one k a step.
template <class Simd>
REMORA_TARGET void widen_group(const PanelCall& call, float* to) {
  const int64_t stride = call.num_panels * kPanel;
  auto w = static_cast<const typename Simd::Stored*>(call.weights);
  for (int64_t step = 0; step < call.num_steps; ++step) {
    for (int panel = 0; panel < call.num_panels; ++panel) {
      __builtin_prefetch(reinterpret_cast<const char*>(w) + kAheadBytes, 0, 3);
      put_steps(to + panel * kPanel, stride, Simd::load_weights(w));
      w += kPanel * Simd::kScalarsPerStep;
    }
    to += Simd::kScalarsPerStep * stride;
  }
}

REMORA_TARGET void widen_row(const uint16_t* from, float* to, int64_t count) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) _mm256_storeu_ps(to + k, load_eight(from + k));
  for (; k < count; ++k) to[k] = BFloat16::widen(from[k]);
}

// Many rows: the group is widened once, rows in turns that stay in the first cache.
template <class Simd, class Wide>
REMORA_TARGET void panel_widened_rows(const PanelCall& call) {
  static thread_local Buffer buffer;
  const int64_t num_inputs = call.num_steps * Simd::kScalarsPerStep;
  const int64_t group = num_inputs * call.num_panels * kPanel;
  // No power of two: else all rows would fall into the same sets of the first cache.
  const int64_t stride = num_inputs + kPanel;
  auto* wide = reinterpret_cast<float*>(
      buffer.take((group + Wide::kRows * stride) * static_cast<int64_t>(sizeof(float))));
  if (wide == nullptr) throw std::bad_alloc();
  widen_group<Simd>(call, wide);
  float* rows = wide + group;
  PanelCall part = call;
  part.weights = wide;
  part.num_steps = num_inputs;
  part.x = rows;
  part.x_stride = stride;
  part.x_rows = nullptr;
  part.next = nullptr;
  for (int64_t row = 0; row < call.num_rows; row += part.num_rows) {
    part.num_rows = std::min<int64_t>(Wide::kRows, call.num_rows - row);
    for (int64_t r = 0; r < part.num_rows; ++r) {
      widen_row(row_of<uint16_t>(call, row + r), rows + r * stride, num_inputs);
    }
    if (call.out_rows != nullptr) {
      part.out_rows = call.out_rows + row;
    } else {
      part.out = static_cast<uint16_t*>(call.out) + row * call.out_stride;
    }
    panel_rows<Wide>(part);
  }
}

}  // namespace

REMORA_TARGET void panel_float(const PanelCall& call) { panel_rows<Float>(call); }
REMORA_TARGET void panel_bfloat16(const PanelCall& call) {
  if (call.num_rows < kWideRows) return panel_rows<BFloat16>(call);
  panel_widened_rows<BFloat16, Widened>(call);
}
REMORA_TARGET void panel_int8(const PanelCall& call) {
  if (call.num_rows < kWideRowsInt8) return panel_rows<Int8>(call);
  panel_widened_rows<Int8, WidenedScaled>(call);
}
REMORA_TARGET void panel_int4(const PanelCall& call) {
  panel_widened(call, widen_int4, panel_bfloat16);
}
REMORA_TARGET void row_float(const RowCall& call) { dot_rows<Float>(call); }
REMORA_TARGET void row_bfloat16(const RowCall& call) { dot_rows<BFloat16>(call); }

}  // namespace remora::avx2
#endif
