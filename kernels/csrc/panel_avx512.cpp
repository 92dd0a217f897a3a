// AVX-512 tiles without bfloat16 instructions: float32, and bfloat16 widened in registers.
#include "panel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "int4.h"

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
  static constexpr int panels(int) { return 4; }
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
  static constexpr int panels(int) { return 4; }
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

struct QuadWeights {
  __m512 k[4];
};

struct Int8 : Avx512<uint16_t> {
  using Stored = uint8_t;
  using Weights = QuadWeights;
  static constexpr bool kScaled = true;
  static constexpr int kScalarsPerStep = 4;
  static constexpr int kRows = 4;
  static constexpr int panels(int) { return 2; }  // a panel of a step holds four registers of weights
  REMORA_INLINE Weights load_weights(const uint8_t* w) {
    const __m512i bytes = _mm512_loadu_si512(w);
    const __m512i magnitude = _mm512_and_si512(bytes, _mm512_set1_epi8(0x7f));
    const __m512i value = _mm512_mask_sub_epi8(magnitude, _mm512_movepi8_mask(bytes),
                                               _mm512_setzero_si512(), magnitude);
    // A column's two values of one half, each in the upper byte of a 16-bit word.
    const __m512i first = _mm512_unpacklo_epi8(_mm512_setzero_si512(), value);
    const __m512i second = _mm512_unpackhi_epi8(_mm512_setzero_si512(), value);
    return {{low(first), high(first), low(second), high(second)}};
  }
  REMORA_INLINE __m512 low(__m512i words) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 24));
  }
  REMORA_INLINE __m512 high(__m512i words) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 24));
  }
  REMORA_INLINE QuadWeights load_x(const uint16_t* x) {
    const Pair first = BFloat16::load_x(x);
    const Pair second = BFloat16::load_x(x + 2);
    return {{first.even, first.odd, second.even, second.odd}};
  }
  REMORA_INLINE Vec dot(Vec acc, const QuadWeights& x, const Weights& w) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) acc = _mm512_fmadd_ps(x.k[k], w.k[k], acc);
    return acc;
  }
};

}  // namespace

REMORA_TARGET void panel_float(const PanelCall& call) { panel_rows<Float>(call); }
REMORA_TARGET void panel_bfloat16(const PanelCall& call) { panel_rows<BFloat16>(call); }
REMORA_TARGET void panel_int8(const PanelCall& call) { panel_rows<Int8>(call); }
REMORA_TARGET void panel_int4(const PanelCall& call) {
  panel_widened(call, widen_int4, panel_bfloat16);
}
REMORA_TARGET void row_float(const RowCall& call) { dot_rows<Float>(call); }
REMORA_TARGET void row_bfloat16(const RowCall& call) { dot_rows<BFloat16>(call); }

}  // namespace remora::avx512
#endif
