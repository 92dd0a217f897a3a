// Tiles for a machine of which nothing is known, and the choice between all of them.
#include "panel.h"

#include <cstring>

#include "amx.h"
#include "int4.h"
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
void panel_int4(const PanelCall& call) {
  panel_widened(call, widen_int4, panel_bfloat16);
}
void row_float(const RowCall& call) { dot_rows<Float>(call); }
void row_bfloat16(const RowCall& call) { dot_rows<BFloat16>(call); }

}  // namespace remora::portable

namespace remora {

namespace {

// A kernel of each format of weights, in the order of WeightFormat.
struct Kernels {
  PanelKernel of[4];
};

Kernels kernels_here() {
#if defined(__x86_64__)
  // avx512_bf16 leaves float32 to avx512.
  if (isa() == Isa::kAmxBf16) {
    return {{avx512::panel_float, amx::panel_bfloat16, amx::panel_int8, amx::panel_int4}};
  }
  if (isa() == Isa::kAvx512Bf16) {
    return {{avx512::panel_float, avx512_bf16::panel_bfloat16, avx512_bf16::panel_int8,
             avx512_bf16::panel_int4}};
  }
  if (isa() == Isa::kAvx512) {
    return {{avx512::panel_float, avx512::panel_bfloat16, avx512::panel_int8, avx512::panel_int4}};
  }
  if (isa() == Isa::kAvx2) {
    return {{avx2::panel_float, avx2::panel_bfloat16, avx2::panel_int8, avx2::panel_int4}};
  }
#endif
  return {{portable::panel_float, portable::panel_bfloat16, portable::panel_int8,
           portable::panel_int4}};
}

}  // namespace

PanelKernel panel_kernel(WeightFormat format) {
  static const Kernels kernels = [] {
    Kernels found = kernels_here();
    if (amx_is_emulated()) {
      found = {{found.of[0], amx::panel_emulated, amx::panel_int8_emulated, amx::panel_int4_emulated}};
    }
    return found;
  }();
  return kernels.of[static_cast<int>(format)];
}

bool panel_is_tiled(WeightFormat format) {
  return format != WeightFormat::kFloat32 && (amx_is_emulated() || isa() == Isa::kAmxBf16);
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
