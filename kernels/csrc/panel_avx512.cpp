// AVX-512 tiles without bfloat16 instructions: float32, and bfloat16 widened in registers.
#include "panel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#define REMORA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

namespace remora::avx512 {
namespace {

#include "simd_avx512.h"

#include "panel_tiles.h"

#include "row_tiles.h"

struct Float : Avx512<float> {
  using Weights = __m512;
  static constexpr int kScalarsPerStep = 1;
  static constexpr int kRows = 6;
  static constexpr int kPanels = 4;
  REMORA_INLINE Weights load_weights(const float* w) { return _mm512_loadu_ps(w); }
  REMORA_INLINE __m512 load_x(const float* x) { return _mm512_set1_ps(*x); }
  REMORA_INLINE Vec dot(Vec acc, __m512 x, Weights w) { return _mm512_fmadd_ps(x, w, acc); }

  static constexpr int kLanes = 16;
  REMORA_INLINE Vec dot_lanes(Vec acc, const float* x, const float* w, int count) {
    return _mm512_fmadd_ps(load_lanes(x, count), load_lanes(w, count), acc);
  }
};

struct Pair {
  __m512 even;
  __m512 odd;
};

REMORA_INLINE Pair split(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))};
}

struct BFloat16 : Avx512<uint16_t> {
  using Weights = Pair;
  static constexpr int kScalarsPerStep = 2;
  static constexpr int kRows = 4;  // a step holds two registers of weights and two of x
  static constexpr int kPanels = 4;
  REMORA_INLINE Weights load_weights(const uint16_t* w) { return split(_mm512_loadu_si512(w)); }
  REMORA_INLINE Pair load_x(const uint16_t* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return split(_mm512_set1_epi32(pair));
  }
  REMORA_INLINE Vec dot(Vec acc, const Pair& x, const Weights& w) {
    return _mm512_fmadd_ps(x.odd, w.odd, _mm512_fmadd_ps(x.even, w.even, acc));
  }

  static constexpr int kLanes = 16;
  REMORA_INLINE Vec dot_lanes(Vec acc, const uint16_t* x, const uint16_t* w, int count) {
    return _mm512_fmadd_ps(load_lanes(x, count), load_lanes(w, count), acc);
  }
};

}  // namespace

REMORA_TARGET void panel_float(const PanelCall& call) { panel_rows<Float>(call); }
REMORA_TARGET void panel_bfloat16(const PanelCall& call) { panel_rows<BFloat16>(call); }
REMORA_TARGET void row_float(const RowCall& call) { dot_rows<Float>(call); }
REMORA_TARGET void row_bfloat16(const RowCall& call) { dot_rows<BFloat16>(call); }

}  // namespace remora::avx512
#endif
