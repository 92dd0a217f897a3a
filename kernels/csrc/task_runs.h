// Tasks shared out so that a worker knows what it does next: weights can be asked for before they
// are needed.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace remora {

// Tasks 0..num_tasks-1, cut into one run for each worker, who takes its own from the front. Who has
// none left takes another's from the back: a worker that never begins costs nothing but that.
class TaskRuns {
 public:
  struct Taken {
    int64_t task = -1;  // negative: none is left
    int64_t next = -1;  // the one that this worker takes afterwards, unless another does; or none
  };

  TaskRuns(int64_t num_tasks, int num_workers)
      : num_workers_(num_workers), runs_(new Run[num_workers]) {
    for (int64_t w = 0; w < num_workers; ++w) {
      runs_[w].bounds.store(
          bounds_of(num_tasks * w / num_workers, num_tasks * (w + 1) / num_workers),
          std::memory_order_relaxed);
    }
  }

  Taken take(int worker) {
    Taken taken = take_from(runs_[worker], true);
    for (int other = 1; taken.task < 0 && other < num_workers_; ++other) {
      taken = take_from(runs_[(worker + other) % num_workers_], false);
    }
    return taken;
  }

 private:
  // First task that is left and the end, in one word: both of its ends have takers.
  struct alignas(64) Run {
    std::atomic<uint64_t> bounds;
  };

  static uint64_t bounds_of(uint64_t begin, uint64_t end) { return begin << 32 | end; }

  static Taken take_from(Run& run, bool front) {
    uint64_t seen = run.bounds.load(std::memory_order_relaxed);
    while (true) {
      const int64_t begin = seen >> 32, end = seen & UINT32_MAX;
      if (begin >= end) return {};
      const int64_t left_begin = begin + front, left_end = end - !front;
      if (!run.bounds.compare_exchange_weak(seen, bounds_of(left_begin, left_end),
                                            std::memory_order_relaxed)) {
        continue;
      }
      if (left_begin == left_end) return {front ? begin : left_end, -1};
      return front ? Taken{begin, left_begin} : Taken{left_end, left_end - 1};
    }
  }

  const int num_workers_;
  const std::unique_ptr<Run[]> runs_;
};

}  // namespace remora
