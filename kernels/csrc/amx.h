// bfloat16 panels on AMX tiles; see amx.cpp.
#pragma once

#include "panel.h"

namespace remora::amx {

void panel_bfloat16(const PanelCall& call);  // where amx_is_there()
void panel_emulated(const PanelCall& call);  // the same tiling in plain C++, for tests

// Whether the machine has AMX bf16 and the system lets this process use it.
bool amx_is_there();

// Whether the tiles give what the emulation gives, on sums that are exact. Only where it is there.
bool amx_works();

}  // namespace remora::amx
