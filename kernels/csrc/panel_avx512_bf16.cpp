// AVX-512 tiles with `vdpbf16ps`: two products a lane and instruction, accumulated in float32.
// The instruction takes denormals as zero and does not round between its two products; that is the
// same for every row and every tile, which is all the contract asks.
#include "panel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#define REMORA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")))

namespace remora::avx512_bf16 {
namespace {

#include "simd_avx512.h"

#include "panel_tiles.h"

#include "row_tiles.h"

struct BFloat16 : Avx512<uint16_t> {
  using Weights = __m512bh;
  static constexpr int kScalarsPerStep = 2;
  static constexpr int kRows = 6;  // 24 accumulators, 4 weights, 1 x of 32 registers
  static constexpr int kPanels = 4;
  REMORA_INLINE Weights load_weights(const uint16_t* w) {
    return reinterpret_cast<Weights>(_mm512_loadu_si512(w));
  }
  REMORA_INLINE __m512bh load_x(const uint16_t* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  REMORA_INLINE Vec dot(Vec acc, __m512bh x, Weights w) { return _mm512_dpbf16_ps(acc, x, w); }

  static constexpr int kLanes = 32;
  REMORA_INLINE Vec dot_lanes(Vec acc, const uint16_t* x, const uint16_t* w, int count) {
    const __mmask32 lanes = count == 32 ? ~0u : (1u << count) - 1u;
    return _mm512_dpbf16_ps(acc, reinterpret_cast<Weights>(_mm512_maskz_loadu_epi16(lanes, x)),
                            reinterpret_cast<Weights>(_mm512_maskz_loadu_epi16(lanes, w)));
  }
};

// Bytes of bfloat16(0..127), low and high, as tables for a permutation of bytes: an index has seven
// bits there, so the sign above them falls away by itself.
struct Bytes {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};

constexpr Bytes widened_bytes() {
  Bytes tables{};
  for (int value = 1; value < 128; ++value) {
    int exponent = 0;
    while ((value >> (exponent + 1)) != 0) ++exponent;
    const int mantissa = (value << (7 - exponent)) & 0x7f;
    const int bits = ((127 + exponent) << 7) | mantissa;
    tables.low[value] = static_cast<uint8_t>(bits & 0xff);
    tables.high[value] = static_cast<uint8_t>(bits >> 8);
  }
  return tables;
}

constexpr Bytes kBytes = widened_bytes();

struct HalfWeights {
  __m512bh first;
  __m512bh second;
};

// avx512vbmi is asked for before this is chosen (panel_kernel): Cooper Lake has none.
struct Int8 : Avx512<uint16_t> {
  using Stored = uint8_t;
  using Weights = HalfWeights;
  static constexpr bool kScaled = true;
  static constexpr int kScalarsPerStep = 4;
  static constexpr int kRows = 4;  // 16 accumulators, 8 weights, 4 tables, 2 x of 32 registers
  static constexpr int kPanels = 4;
  REMORA_INLINE Weights load_weights(const uint8_t* w) {
    const __m512i bytes = _mm512_loadu_si512(w);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kBytes.low), bytes,
                                                 _mm512_load_si512(kBytes.low + 64));
    const __m512i magnitude = _mm512_permutex2var_epi8(_mm512_load_si512(kBytes.high), bytes,
                                                       _mm512_load_si512(kBytes.high + 64));
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, bytes, sign, 0xf8);  // a | (b & c)
    return {reinterpret_cast<__m512bh>(_mm512_unpacklo_epi8(low, high)),
            reinterpret_cast<__m512bh>(_mm512_unpackhi_epi8(low, high))};
  }
  REMORA_INLINE HalfWeights load_x(const uint16_t* x) {
    return {BFloat16::load_x(x), BFloat16::load_x(x + 2)};
  }
  REMORA_INLINE Vec dot(Vec acc, const HalfWeights& x, const Weights& w) {
    return _mm512_dpbf16_ps(_mm512_dpbf16_ps(acc, x.first, w.first), x.second, w.second);
  }
};

}  // namespace

REMORA_TARGET void panel_int8(const PanelCall& call) { panel_rows<Int8>(call); }
REMORA_TARGET void panel_bfloat16(const PanelCall& call) { panel_rows<BFloat16>(call); }
REMORA_TARGET void row_bfloat16(const RowCall& call) { dot_rows<BFloat16>(call); }

}  // namespace remora::avx512_bf16
#endif
