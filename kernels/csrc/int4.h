// Weights of four bits (panel.h), one value at a time, and through the bfloat16 kernels.
#pragma once

#include "panel.h"

namespace remora {

// Scales of 16 columns from their bytes.
struct PlainInt4Scales {
  float of[kPanel];
};
PlainInt4Scales plain_int4_scales(const uint8_t* bytes);

// A line of a panel, eight k, as bfloat16: four rows of pairs of k, `stride_bytes` apart.
void widen_int4_line(const uint8_t* line, const PlainInt4Scales& scales, char* to,
                     int64_t stride_bytes);

// The same call over the widened weights in memory of this thread.
using WidenInt4 = void (*)(const PanelCall& call, char* to);
void panel_widened(const PanelCall& call, WidenInt4 widen, PanelKernel bfloat16);
void widen_int4(const PanelCall& call, char* to);  // for any machine

}  // namespace remora
