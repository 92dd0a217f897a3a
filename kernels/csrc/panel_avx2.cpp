// The portable tiles, compiled for AVX2: the same operations, hence the same bits.
#include "panel.h"

#if defined(__x86_64__)
#include <cstring>

#include "int4.h"

#define REMORA_TARGET __attribute__((target("avx2,fma")))

namespace remora::avx2 {
namespace {

#include "simd_generic.h"

#include "panel_tiles.h"

#include "row_tiles.h"

#include "panel_generic.h"

}  // namespace

REMORA_TARGET void panel_float(const PanelCall& call) { panel_rows<Float>(call); }
REMORA_TARGET void panel_bfloat16(const PanelCall& call) { panel_rows<BFloat16>(call); }
REMORA_TARGET void panel_int8(const PanelCall& call) { panel_rows<Int8>(call); }
REMORA_TARGET void panel_int4(const PanelCall& call) {
  panel_widened(call, widen_int4, panel_bfloat16);
}
REMORA_TARGET void row_float(const RowCall& call) { dot_rows<Float>(call); }
REMORA_TARGET void row_bfloat16(const RowCall& call) { dot_rows<BFloat16>(call); }

}  // namespace remora::avx2
#endif
