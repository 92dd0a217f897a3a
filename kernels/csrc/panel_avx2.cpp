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

// Two k at a time: four would need eight registers beside the sums.
struct Int8 : Avx2<uint16_t> {
  using Stored = uint8_t;
  using Weights = PairWeights;
  static constexpr bool kScaled = true;
  static constexpr int kScalarsPerStep = 4;
  static constexpr int kParts = 2;
  static constexpr int kRows = 4;
  static constexpr int panels(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
  REMORA_INLINE Weights load_weights(const uint8_t* w, int part) {
    const __m256i low = signed_bytes(w), high = signed_bytes(w + 32);
    const int k = 2 * part;
    return {{widen(low, k), widen(high, k)}, {widen(low, k + 1), widen(high, k + 1)}};
  }
  REMORA_INLINE __m256i signed_bytes(const uint8_t* w) {
    const __m256i bytes = load_bytes(w);
    return _mm256_sign_epi8(_mm256_and_si256(bytes, _mm256_set1_epi8(0x7f)), bytes);
  }
  // One k of eight columns, times 2^24: its byte goes to the top of a word, so no shift is needed.
  REMORA_INLINE __m256 widen(__m256i bytes, int k) {
    const int at = k / 2 * 8 + k % 2;
    const __m128i places = _mm_setr_epi8(-1, -1, -1, at, -1, -1, -1, at + 2, -1, -1, -1, at + 4, -1,
                                         -1, -1, at + 6);
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(places)));
  }
  REMORA_INLINE Vec scale(const Vec& acc, const float* scales, int count) {
    const Lanes by = load_lanes(scales, count);
    const __m256 unit = _mm256_set1_ps(0x1p-24f);
    return {_mm256_mul_ps(acc.low, _mm256_mul_ps(by.low, unit)),
            _mm256_mul_ps(acc.high, _mm256_mul_ps(by.high, unit))};
  }
  REMORA_INLINE Pair load_x(const uint16_t* x) { return BFloat16::load_x(x); }
  REMORA_INLINE Vec dot(const Vec& acc, const Pair& x, const Weights& w) {
    return BFloat16::dot(acc, x, w);
  }
};

struct WidenedScaled : Widened {
  static constexpr bool kScaled = true;
  REMORA_INLINE Vec scale(const Vec& acc, const float* scales, int count) {
    return Int8::scale(acc, scales, count);
  }
};

REMORA_INLINE void put_steps(float* to, int64_t stride, const PairWeights& w) {
  store_sixteen(to, w.even);
  store_sixteen(to + stride, w.odd);
}

// A group as float32 tiles hold it: one k a step.
template <class Simd>
REMORA_TARGET void widen_group(const PanelCall& call, float* to) {
  const int64_t stride = call.num_panels * kPanel;
  auto w = static_cast<const typename Simd::Stored*>(call.weights);
  for (int64_t step = 0; step < call.num_steps; ++step) {
    for (int panel = 0; panel < call.num_panels; ++panel) {
      __builtin_prefetch(reinterpret_cast<const char*>(w) + kAheadBytes, 0, 3);
#pragma GCC unroll 2
      for (int part = 0; part < Simd::kParts; ++part) {
        put_steps(to + panel * kPanel + 2 * part * stride, stride, weights_of<Simd>(w, part));
      }
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
