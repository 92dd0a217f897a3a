#include "isa.h"

#include "amx.h"

#include "source_hash.h"  // written by setup.py

#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>

namespace remora {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
constexpr const char* kEmulated = "amx_emulated";

Isa machine_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // What is compiled for bfloat16 products may permute bytes too, which Cooper Lake cannot.
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") &&
                    __builtin_cpu_supports("avx512vbmi");
  if (bf16 && amx::amx_is_there()) {
    if (amx::amx_works()) return Isa::kAmxBf16;
    TORCH_WARN("the AMX tiles of this machine give other sums than they should: avx512_bf16 serves");
  }
  if (bf16) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa choose_isa() {
  const Isa best = machine_isa();
  const char* limit = std::getenv("REMORA_ISA");
  if (limit == nullptr) return best;
  if (std::string(limit) == kEmulated) return std::min(best, Isa::kAvx512Bf16);
  for (int i = 0; i < 5; ++i) {
    if (std::string(limit) == kNames[i]) return std::min(best, static_cast<Isa>(i));
  }
  TORCH_CHECK(false, "REMORA_ISA must be portable, avx2, avx512, avx512_bf16 or amx_bf16, got ", limit);
}

// Of the sources this library was built from (setup.py).
std::string source_hash() { return REMORA_SOURCE_HASH; }

std::string isa_name() {
  if (amx_is_emulated()) return kEmulated;
  return kNames[static_cast<int>(isa())];
}

}  // namespace

bool amx_is_emulated() {
  static const char* const asked = std::getenv("REMORA_ISA");
  return asked != nullptr && std::string(asked) == kEmulated;
}

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  m.def("isa() -> str", &remora::isa_name);
  m.def("source_hash() -> str", &remora::source_hash);
}
