// A thread team of our own, for kernels of microseconds.
//
// OpenMP's idle threads either sleep, and every region costs a wake-up of 5 to 50 microseconds, or
// spin, and burn the core that another process of this host needs. Here helpers spin a short time
// after a task, so that the kernels of one layer find them awake, and sleep on a futex then. A
// helper that has not begun when the caller is done with its own part is not waited for: the caller
// takes the part back. So a busy machine costs speed, never a stall.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace remora {

// The i-th look of a spinning thread failed: a pause, and after many the core goes to others.
void pause_in_spin(int64_t i);

using TeamWork = void (*)(void* context, int worker);

// Threads a region of the calling thread may use, itself included: torch's own count.
int team_size();

// Whether the helpers are awake: a region then costs well below a microsecond.
bool team_is_awake();

// Calls work(context, w) once for each w in 0..num_workers-1, the caller being worker 0, and returns
// when all have returned. Several may run in one thread, one after the other, in any order: work must
// not wait for another worker to begin. One region at a time: a call from inside a region, or from a
// second thread meanwhile, runs all in its own thread. The first exception of a worker is rethrown
// once every worker has ended.
void team_run_raw(int num_workers, TeamWork work, void* context);

template <class Work>
void team_run(int num_workers, Work&& work) {
  using Plain = std::remove_reference_t<Work>;
  team_run_raw(
      num_workers, [](void* context, int worker) { (*static_cast<Plain*>(context))(worker); },
      const_cast<void*>(static_cast<const void*>(std::addressof(work))));
}

// Calls work(begin, end) on pieces of 0..count-1 of at most `grain`, by as many threads as there are
// pieces; threads take the next piece when they are free.
template <class Work>
void team_for(int64_t count, int64_t grain, Work&& work) {
  const int64_t num_pieces = (count + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  team_run(static_cast<int>(std::min<int64_t>(team_size(), num_pieces)), [&](int) {
    for (int64_t i = next.fetch_add(1); i < num_pieces; i = next.fetch_add(1)) {
      work(i * grain, std::min(count, (i + 1) * grain));
    }
  });
}

// Work that a call means, in the bytes that one core streams meanwhile.
constexpr int64_t kMacsPerByte = 6;  // multiply-adds of one core in the time of one byte (Zen 5)

// Threads that a call of this cost is worth, at most `num_tasks`.
int team_workers(int64_t cost_bytes, int64_t num_tasks);

// Looks until `done()`; for what another thread is just about to finish.
template <class Done>
void spin_until(Done done) {
  for (int64_t i = 0; !done(); ++i) pause_in_spin(i);
}

// The calling thread is about to wait for another process: helpers go to sleep now, not later.
void team_park();

// What it waited for has come: those helpers that had work since the last time wake up now, while the
// caller is on its way to the next region. Nothing to do for a model so small that none had.
void team_wake();

}  // namespace remora

// For other extensions; their addresses are `torch.ops.remora.team_park_address()`, `..wake_address()`.
extern "C" void remora_team_park();
extern "C" void remora_team_wake();
