// Where the time of a process goes inside kernels: one line at the top of an op,
//
//     const PhaseTimer timer(Phase::kLinear);
//
// adds the wall time until the end of the scope to a counter of the whole process. Timers may
// nest; only the outermost of a thread counts, so the counters add up to time inside kernels.
// Always on: two readings of the monotonic clock, 45 ns an op (Zen 5 in a VM, 2026-11-22), of which
// a decode step has some ten a layer. Read by `torch.ops.remora.phase_ns()` (kernels/phases.py).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace remora {

// Their names are in phase.cpp, in this order.
enum class Phase : int {
  kLinear,       // packed dense linears: projections, shared experts, head
  kRowLinear,    // linears over ordinary weights: gates
  kExperts,      // routed experts: a whole call, or its grouped linears
  kActivation,   // gate functions outside a whole expert call
  kAttention,    // writing K and V into pages, and attending
  kRouting,      // sorting, gathering and summing rows
  kElementwise,  // norms, rotary embeddings and the like, where they are ops of ours
  kSampling,
  kCollective,  // waiting for, and adding up with, tensor-parallel ranks
  kCount
};

inline std::atomic<int64_t> phase_counters[static_cast<int>(Phase::kCount)];  // nanoseconds
inline thread_local int phase_depth = 0;

class PhaseTimer {
 public:
  explicit PhaseTimer(Phase phase) : phase_(phase), outermost_(phase_depth++ == 0) {
    if (outermost_) begin_ = std::chrono::steady_clock::now();
  }
  ~PhaseTimer() {
    --phase_depth;
    if (!outermost_) return;
    const auto spent = std::chrono::steady_clock::now() - begin_;
    phase_counters[static_cast<int>(phase_)].fetch_add(
        std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count(),
        std::memory_order_relaxed);
  }
  PhaseTimer(const PhaseTimer&) = delete;
  PhaseTimer& operator=(const PhaseTimer&) = delete;

 private:
  const Phase phase_;
  const bool outermost_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace remora
