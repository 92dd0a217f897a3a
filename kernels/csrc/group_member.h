// The ends of tensor-parallel groups by number, and what the operations on them have in common
// (collectives.cpp, group_slices.cpp).
#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "phase.h"
#include "shared_group.h"

namespace remora {

// Operations as `group_counters` lists them (comm/accounting.py: COLLECTIVES).
enum Operation { kSum, kGatherRows, kGatherColumns, kSumSlice, kGatherSlices, kOperations };

struct Count {
  std::atomic<int64_t> calls{0};
  std::atomic<int64_t> sent{0};      // bytes of ours that other ranks read, once for each of them
  std::atomic<int64_t> received{0};  // bytes of other ranks that we read
};

struct Member {
  std::unique_ptr<SharedGroup> group;  // none: a group of a compiler's or a warm-up's imagination
  std::array<Count, kOperations> counts;
  int rank;
  int size;
  bool dry = false;  // nothing is exchanged, shapes are right and values mean nothing
};

// The end of an open group; an error of torch's where there is none of this number.
std::shared_ptr<Member> member_of(int64_t number);

// Where the run of `count` rows or columns of a rank begins.
inline int64_t first_of(int64_t rank, int64_t count, int64_t size) {
  return (rank * count + size - 1) / size;
}

inline void note(Member& member, Operation operation, int64_t sent, int64_t received) {
  Count& count = member.counts[operation];
  count.calls.fetch_add(1, std::memory_order_relaxed);
  count.sent.fetch_add(sent, std::memory_order_relaxed);
  count.received.fetch_add(received, std::memory_order_relaxed);
}

// Sum of the parts in float32, in their order, rounded once.
void sum_parts(const std::vector<const char*>& parts, float* out, int64_t count);
void sum_parts(const std::vector<const char*>& parts, uint16_t* out, int64_t count);

// What is aborted or late is told as an error of torch's; `group_abort_text` has the bare reason.
template <class F>
void guarded(F work) {
  const PhaseTimer timer(Phase::kCollective);
  try {
    work();
  } catch (const GroupError& error) {
    TORCH_CHECK(false, "tensor-parallel group: ", error.what());
  }
}

}  // namespace remora
