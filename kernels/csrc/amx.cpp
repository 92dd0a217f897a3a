// bfloat16, one-byte and four-bit panels on the tiles of AMX; amx_tiling.h says how. Run on an Intel Xeon with
// amx_bf16 (benchmarks/notes/2026-11-28-kernels.md); `amx_works` still asks before they are used.
#include "amx.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "buffer.h"
#include "packed_shape.h"
#include "scalar.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REMORA_TARGET \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))

namespace remora::amx {
namespace {

#include "simd_avx512.h"

#include "simd_int8.h"

#include "simd_int4.h"

// Assembly, since gcc's intrinsics neither take a tile's number from a template nor say that they
// read memory.
struct RealTiles {
  REMORA_INLINE void configure(int rows, int second) {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t heights[16] = {};
    } config;
    const uint8_t a = static_cast<uint8_t>(rows);
    const uint8_t b = static_cast<uint8_t>(second);
    const uint8_t one[8] = {a, a, a, a, a, 16, 16, 16};
    const uint8_t two[8] = {a, a, b, b, a, b, 16, 16};
    std::memcpy(config.heights, second == 0 ? one : two, sizeof one);
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  REMORA_INLINE void end() { asm volatile("tilerelease" ::: "memory"); }
  template <int kTile>
  REMORA_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  REMORA_INLINE void load(const void* from, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  REMORA_INLINE void store(float* to, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile)
                 : "memory");
  }
  template <int kSum, int kRows, int kWeights>
  REMORA_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kRows), "i"(kWeights));
  }
  REMORA_INLINE void widen_bytes(const uint8_t* from, char* to, int64_t stride_bytes) {
    const WideStep wide = widen_step(from);
    _mm512_storeu_si512(to, wide.first);
    _mm512_storeu_si512(to + stride_bytes, wide.second);
  }
  REMORA_INLINE Int4Scales int4_scales(const uint8_t* bytes) { return load_int4_scales(bytes); }
  REMORA_INLINE void widen_nibbles(const uint8_t* from, const Int4Scales& scales, char* to,
                                   int64_t stride_bytes) {
    const Int4Line line = widen_line(from, scales);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      _mm512_storeu_si512(to + pair * stride_bytes, line.pairs[pair]);
    }
  }
};

REMORA_TARGET void finish_row(const float* sums, const float* scale, const uint16_t* bias,
                              int num_columns, uint16_t* out) {
  for (int column = 0; column < num_columns; column += kPanel) {
    const int count = std::min<int>(kPanel, num_columns - column);
    __m512 sum = _mm512_loadu_ps(sums + column);
    if (scale != nullptr) sum = _mm512_mul_ps(sum, load_lanes(scale + column, count));
    if (bias != nullptr) sum = _mm512_add_ps(sum, load_lanes(bias + column, count));
    store_lanes(out + column, sum, count);
  }
}

#include "amx_tiling.h"

#include "amx_narrow.h"

// The system must be asked once before a process may use the tiles' state.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool has_tiles = (edx >> 24 & 1) != 0 && (edx >> 22 & 1) != 0;
  return has_tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Whether both implementations give the same bits, on rows and weights with tails of everything.
bool agree(PanelKernel real, PanelKernel emulated, WeightFormat format) {
  constexpr int64_t kInputs = 88, kColumns = 55, kMostRows = 67;
  static uint16_t x[kMostRows][kInputs];
  static uint16_t weights[kInputs * kGroup];
  static float scale[kGroup];
  static uint16_t outs[2][kMostRows][kColumns];
  // Fractions, so that another order of the sums would show; int8 and int4 take any bytes.
  for (int64_t i = 0; i < kMostRows * kInputs; ++i) {
    narrow(static_cast<float>(i * 37 % 101 - 50) / 7.0f, &x[0][0] + i);
  }
  for (int64_t i = 0; i < kInputs * kGroup; ++i) {
    narrow(static_cast<float>(i * 29 % 97 - 48) / 11.0f, weights + i);
  }
  for (int64_t i = 0; i < kGroup; ++i) scale[i] = static_cast<float>(i + 1) / 13.0f;
  for (const int64_t num_rows : {int64_t{1}, int64_t{19}, int64_t{43}, kMostRows}) {
    std::memset(outs, 0, sizeof outs);
    for (int i = 0; i < 2; ++i) {
      const PackedShape shape{kInputs, kColumns, format};
      PanelCall call = shape.group_call(0, reinterpret_cast<const char*>(weights), nullptr);
      call.x = x;
      call.x_stride = kInputs;
      call.num_rows = num_rows;
      if (format == WeightFormat::kInt8) call.scale = scale;
      call.out = outs[i];
      call.out_stride = kColumns;
      (i == 0 ? real : emulated)(call);
    }
    if (std::memcmp(outs[0], outs[1], sizeof outs[0]) != 0) return false;
  }
  return true;
}

}  // namespace

REMORA_TARGET void panel_bfloat16(const PanelCall& call) {
  panel_rows<RealTiles, PlainWeights<false>>(call, call.num_steps * kPairBytes);
}
REMORA_TARGET void panel_int8(const PanelCall& call) { panel_narrow<RealTiles, Int8Form<RealTiles>>(call); }
REMORA_TARGET void panel_int4(const PanelCall& call) {
  panel_narrow<RealTiles, Int4Form<RealTiles>>(call);
}

bool amx_is_there() {
  static const bool answer = may_use_tiles();
  return answer;
}

bool amx_works() {
  return agree(panel_bfloat16, panel_emulated, WeightFormat::kBFloat16) &&
         agree(panel_int8, panel_int8_emulated, WeightFormat::kInt8) &&
         agree(panel_int4, panel_int4_emulated, WeightFormat::kInt4);
}

}  // namespace remora::amx
#else
namespace remora::amx {
void panel_bfloat16(const PanelCall& call) { panel_emulated(call); }
void panel_int8(const PanelCall& call) { panel_int8_emulated(call); }
void panel_int4(const PanelCall& call) { panel_int4_emulated(call); }
bool amx_is_there() { return false; }
bool amx_works() { return false; }
}  // namespace remora::amx
#endif
