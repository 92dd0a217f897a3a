// bfloat16, one-byte and four-bit panels on AMX tiles; see amx_tiling.h. Rows lie one stride apart (x, never
// x_rows).
#pragma once

#include "panel.h"

namespace remora::amx {

void panel_bfloat16(const PanelCall& call);  // where amx_is_there()
void panel_int8(const PanelCall& call);
void panel_int4(const PanelCall& call);
void panel_emulated(const PanelCall& call);  // the same tiling in plain C++, for tests
void panel_int8_emulated(const PanelCall& call);
void panel_int4_emulated(const PanelCall& call);

// Whether the machine has AMX bf16 and the system lets this process use it.
bool amx_is_there();

// Whether the tiles give the bits that the emulation gives. Only where it is there.
bool amx_works();

}  // namespace remora::amx
