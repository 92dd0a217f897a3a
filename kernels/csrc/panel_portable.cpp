// Tiles for a machine of which nothing is known, and the choice between all of them.
#include "panel.h"

#include <cstring>

#include "amx.h"
#include "isa.h"

#define REMORA_TARGET

namespace remora::portable {
namespace {

#include "simd_generic.h"

#include "panel_tiles.h"

#include "row_tiles.h"

#include "panel_generic.h"

}  // namespace

void panel_float(const PanelCall& call) { panel_rows<Float>(call); }
void panel_bfloat16(const PanelCall& call) { panel_rows<BFloat16>(call); }
void panel_int8(const PanelCall& call) { panel_rows<Int8>(call); }
void row_float(const RowCall& call) { dot_rows<Float>(call); }
void row_bfloat16(const RowCall& call) { dot_rows<BFloat16>(call); }

}  // namespace remora::portable

namespace remora {

PanelKernel panel_kernel(bool bfloat16, bool int8) {
#if defined(__x86_64__)
  if (bfloat16 && amx_is_emulated()) return int8 ? amx::panel_int8_emulated : amx::panel_emulated;
  if (bfloat16 && isa() == Isa::kAmxBf16) return int8 ? amx::panel_int8 : amx::panel_bfloat16;
  if (int8) {
    const bool permutes_bytes = __builtin_cpu_supports("avx512vbmi");
    if (isa() >= Isa::kAvx512Bf16 && permutes_bytes) return avx512_bf16::panel_int8;
    if (isa() >= Isa::kAvx512) return avx512::panel_int8;
    return isa() == Isa::kAvx2 ? avx2::panel_int8 : portable::panel_int8;
  }
  if (bfloat16 && isa() >= Isa::kAvx512Bf16) return avx512_bf16::panel_bfloat16;
  if (isa() >= Isa::kAvx512) return bfloat16 ? avx512::panel_bfloat16 : avx512::panel_float;
  if (isa() == Isa::kAvx2) return bfloat16 ? avx2::panel_bfloat16 : avx2::panel_float;
#endif
  if (int8) return portable::panel_int8;
  return bfloat16 ? portable::panel_bfloat16 : portable::panel_float;
}

bool panel_is_tiled(bool bfloat16) {
  return bfloat16 && (amx_is_emulated() || isa() == Isa::kAmxBf16);
}

RowKernel row_kernel(bool bfloat16) {
#if defined(__x86_64__)
  if (bfloat16 && isa() >= Isa::kAvx512Bf16) return avx512_bf16::row_bfloat16;
  if (isa() >= Isa::kAvx512) return bfloat16 ? avx512::row_bfloat16 : avx512::row_float;
  if (isa() == Isa::kAvx2) return bfloat16 ? avx2::row_bfloat16 : avx2::row_float;
#endif
  return bfloat16 ? portable::row_bfloat16 : portable::row_float;
}

}  // namespace remora
