// phase_names, phase_ns: what phase.h counts, for Python.
#include "phase.h"

#include <torch/library.h>

#include <string>
#include <vector>

namespace remora {
namespace {

constexpr const char* kPhaseNames[] = {"linear",  "row_linear",  "experts",  "activation", "attention",
                                       "routing", "elementwise", "sampling", "collective"};
static_assert(sizeof(kPhaseNames) / sizeof(*kPhaseNames) == static_cast<size_t>(Phase::kCount));

std::vector<std::string> phase_names() { return {std::begin(kPhaseNames), std::end(kPhaseNames)}; }

// Nanoseconds since the process began, in the order of phase_names.
std::vector<int64_t> phase_ns() {
  std::vector<int64_t> result;
  for (const auto& counter : phase_counters) {
    result.push_back(counter.load(std::memory_order_relaxed));
  }
  return result;
}

}  // namespace
}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  m.def("phase_names() -> str[]", &remora::phase_names);
  m.def("phase_ns() -> int[]", &remora::phase_ns);
}
