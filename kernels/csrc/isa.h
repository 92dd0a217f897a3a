// Which instruction set the kernels use: chosen once, at run time, from the machine.
#pragma once

namespace remora {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmxBf16 = 4 };

// The best the machine and the operating system offer, lowered by the environment's REMORA_ISA.
Isa isa();

// Whether tiles of AMX are emulated, for tests (REMORA_ISA=amx_emulated): slow.
bool amx_is_emulated();

}  // namespace remora
