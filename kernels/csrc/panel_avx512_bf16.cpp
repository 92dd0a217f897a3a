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

#include "simd_int8.h"

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
    const WideStep wide = widen_step(w);
    return {reinterpret_cast<__m512bh>(wide.first), reinterpret_cast<__m512bh>(wide.second)};
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
