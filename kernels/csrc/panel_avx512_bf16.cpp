// AVX-512 tiles with `vdpbf16ps`: two products a lane and instruction, accumulated in float32.
// The instruction takes denormals as zero and does not round between its two products; that is the
// same for every row and every tile, which is all the contract asks.
#include "panel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int4.h"

#define REMORA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")))

namespace remora::avx512_bf16 {
namespace {

#include "simd_avx512.h"

#include "simd_int8.h"

#include "simd_int4.h"

#include "panel_tiles.h"

#include "row_tiles.h"

struct BFloat16 : Avx512<uint16_t> {
  using Weights = __m512bh;
  static constexpr int kScalarsPerStep = 2;
  static constexpr int kRows = 6;  // 24 accumulators, 4 weights, 1 x of 32 registers
  static constexpr int panels(int) { return 4; }
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
  static constexpr int panels(int) { return 4; }
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

// Weights of four bits for few rows, widened in registers; see panel.h. Sums run as BFloat16's do.
template <int kR, int kP>
REMORA_TARGET void int4_tile(const PanelCall& call) {
  const uint16_t* x[kR];
  for (int r = 0; r < kR; ++r) x[r] = row_of<uint16_t>(call, r);
  __m512 acc[kR][kP];
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kP; ++p) acc[r][p] = _mm512_setzero_ps();
  }
  const uint8_t* line = static_cast<const uint8_t*>(call.weights);
  const uint8_t* end = line + call.weight_bytes;
  const int64_t to_next = call.next == nullptr ? 0 : static_cast<const uint8_t*>(call.next) - end;
  for (int64_t first = 0; first < call.num_steps; first += kInt4BlockSteps) {
    const int64_t ahead = kAheadBytes + (line + kAheadBytes < end ? 0 : to_next);
    __builtin_prefetch(line + ahead, 0, 3);
    Int4Scales scales[kP];
#pragma GCC unroll 4
    for (int p = 0; p < kP; ++p) scales[p] = load_int4_scales(line + p * kPanel);
    line += kLineBytes;
    const int64_t last = std::min(first + kInt4BlockSteps, call.num_steps);
    for (int64_t step = first; step < last; ++step) {
#pragma GCC unroll 4
      for (int p = 0; p < kP; ++p) {
        __builtin_prefetch(line + ahead, 0, 3);
        const Int4Line wide = widen_line(line, scales[p]);
        line += kLineBytes;
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
          for (int pair = 0; pair < 4; ++pair) {
            acc[r][p] = BFloat16::dot(acc[r][p], BFloat16::load_x(x[r] + step * 8 + pair * 2),
                                      reinterpret_cast<__m512bh>(wide.pairs[pair]));
          }
        }
      }
    }
  }
  finish<BFloat16, kR, kP>(call, 0, 0, acc);
}

template <int kR>
REMORA_TARGET void int4_rows(const PanelCall& call) {
  switch (call.num_panels) {
    case 4: int4_tile<kR, 4>(call); break;
    case 3: int4_tile<kR, 3>(call); break;
    case 2: int4_tile<kR, 2>(call); break;
    default: int4_tile<kR, 1>(call); break;
  }
}

REMORA_TARGET void widen_all(const PanelCall& call, char* to) {
  const uint8_t* line = static_cast<const uint8_t*>(call.weights);
  for (int64_t first = 0; first < call.num_steps; first += kInt4BlockSteps) {
    Int4Scales scales[kGroupPanels];
    for (int p = 0; p < call.num_panels; ++p) scales[p] = load_int4_scales(line + p * kPanel);
    line += kLineBytes;
    const int64_t last = std::min(first + kInt4BlockSteps, call.num_steps);
    for (int64_t step = first; step < last; ++step) {
      for (int p = 0; p < call.num_panels; ++p, line += kLineBytes) {
        __builtin_prefetch(line + kAheadBytes, 0, 3);
        const Int4Line wide = widen_line(line, scales[p]);
        for (int pair = 0; pair < 4; ++pair) {
          char* row = to + ((step * 4 + pair) * call.num_panels + p) * kLineBytes;
          _mm512_storeu_si512(row, wide.pairs[pair]);
        }
      }
    }
  }
}

}  // namespace

REMORA_TARGET void panel_int8(const PanelCall& call) { panel_rows<Int8>(call); }
REMORA_TARGET void panel_int4(const PanelCall& call) {
  switch (call.num_rows) {
    case 1: int4_rows<1>(call); break;
    case 2: int4_rows<2>(call); break;
    case 3: int4_rows<3>(call); break;
    case 4: int4_rows<4>(call); break;
    default: panel_widened(call, widen_all, panel_bfloat16); break;
  }
}
REMORA_TARGET void panel_bfloat16(const PanelCall& call) { panel_rows<BFloat16>(call); }
REMORA_TARGET void row_bfloat16(const RowCall& call) { dot_rows<BFloat16>(call); }

}  // namespace remora::avx512_bf16
#endif
