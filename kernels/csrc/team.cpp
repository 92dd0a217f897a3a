// See team.h. Every helper has one word, `state`, which is all that it and the caller share:
//
//   idle -> posted (caller) -> running (helper) -> idle (helper)      the way of a task
//   posted -> idle (caller)                                          taken back, helper came too late
//   idle -> asleep (helper)                                          after the spin time; posted wakes it
//   idle -> parked (caller) -> asleep (helper)                       the same at once
//   asleep, parked -> idle (caller)                                  work is near
//   running -> awaited (caller) -> idle (helper, who wakes the caller)
#include "team.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <tuple>
#include <vector>

#include <pthread.h>
#include <sched.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "task_runs.h"

namespace remora {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kTeamMax = 256;
// Longer than what lies between two linears of a layer (its attention and the Python around it: 60 to
// 130 microseconds), shorter than anyone would notice.
constexpr std::chrono::microseconds kHelperSpin{150};
constexpr std::chrono::microseconds kCallerSpin{60};
constexpr std::chrono::microseconds kPolite{40};  // who spins longer lets others have the core
constexpr int64_t kLooksBeforeYield = 1000;  // 25 microseconds
// Bytes below which a second thread costs more than it brings: with helpers awake, and asleep.
constexpr int64_t kSerialCost = 1 << 18;
constexpr int64_t kSerialCostAsleep = 1 << 19;

enum State : uint32_t { kIdle, kPosted, kRunning, kAwaited, kAsleep, kParked };

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Sleeps while the word has this value; may return early.
void futex_wait(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr,
          nullptr, 0);
#else
  word.wait(value);
#endif
}

void futex_wake(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
#else
  word.notify_one();
#endif
}

// Looks at the word until `done`, at most so long; whether it became true.
template <class Done>
bool spin(std::chrono::microseconds limit, Done done) {
  const auto begin = Clock::now();
  for (auto now = begin; now - begin < limit; now = Clock::now()) {
    if (now - begin > kPolite) sched_yield();
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      pause_cpu();
    }
  }
  return done();
}

struct alignas(128) Helper {
  std::atomic<uint32_t> state{kIdle};
  int worker = 0;
  TeamWork work = nullptr;
  void* context = nullptr;
  std::exception_ptr error;

  void loop() {
    while (true) {
      uint32_t seen = kPosted;
      if (state.compare_exchange_strong(seen, kRunning, std::memory_order_acquire)) {
        try {
          work(context, worker);
        } catch (...) {
          error = std::current_exception();
        }
        if (state.exchange(kIdle, std::memory_order_acq_rel) == kAwaited) futex_wake(state);
        continue;
      }
      spin(kHelperSpin, [&] { return state.load(std::memory_order_relaxed) != kIdle; });
      seen = kIdle;
      if (!state.compare_exchange_strong(seen, kAsleep) && seen == kParked) {
        state.compare_exchange_strong(seen, kAsleep);
      }
      while (state.load() == kAsleep) futex_wait(state, kAsleep);
    }
  }

  void post(int as_worker, TeamWork task, void* with) {
    worker = as_worker;
    work = task;
    context = with;
    if (state.exchange(kPosted, std::memory_order_acq_rel) == kAsleep) futex_wake(state);
  }

  // Only these two states are left, each only as it is: a task posted meanwhile is not lost.
  void wake() {
    uint32_t seen = kParked;
    if (state.compare_exchange_strong(seen, kIdle)) return;
    if (seen == kAsleep && state.compare_exchange_strong(seen, kIdle)) futex_wake(state);
  }

  // Whether the task was taken back before the helper began it.
  bool take_back() {
    uint32_t seen = kPosted;
    return state.compare_exchange_strong(seen, kIdle);
  }

  void wait() {
    const auto ended = [&] { return state.load(std::memory_order_acquire) != kRunning; };
    if (spin(kCallerSpin, ended)) return;
    uint32_t seen = kRunning;
    if (!state.compare_exchange_strong(seen, kAwaited)) return;
    while (state.load(std::memory_order_acquire) == kAwaited) futex_wait(state, kAwaited);
  }
};

// Helpers are made when first needed and live as long as the process: those that a smaller team does
// not need sleep.
struct Team {
  std::atomic<bool> busy{false};
  std::atomic<int> num_helpers{0};
  std::atomic<int> num_used{0};  // helpers that had work since the last team_wake
  Helper helpers[kTeamMax];

  // Helpers there are, at most `wanted`; fewer where the system gives no thread.
  int grow(int wanted) {
    while (num_helpers.load() < wanted) {
      Helper* helper = &helpers[num_helpers.load()];
      pthread_t thread;
      const auto body = [](void* self) -> void* {
        static_cast<Helper*>(self)->loop();
        return nullptr;
      };
      if (pthread_create(&thread, nullptr, body, helper) != 0) break;
      pthread_detach(thread);
      num_helpers.fetch_add(1);
    }
    return std::min(wanted, num_helpers.load());
  }
};

std::atomic<Team*> current{nullptr};

// A forked child has none of its parent's threads: it starts with a team of its own.
void forget_team() { current.store(new Team); }

Team& team() {
  static std::once_flag once;
  std::call_once(once, [] {
    current.store(new Team);  // never freed: helpers may outlive the destructors of statics
    pthread_atfork(nullptr, nullptr, forget_team);
  });
  return *current.load();
}

void run_alone(int num_workers, TeamWork work, void* context) {
  for (int worker = 0; worker < num_workers; ++worker) work(context, worker);
}

}  // namespace

int team_size() {
  if (at::in_parallel_region()) return 1;
  return std::min(at::get_num_threads(), kTeamMax);
}

bool team_is_awake() {
  Team& self = team();
  return self.num_helpers.load(std::memory_order_relaxed) > 0 &&
         self.helpers[0].state.load(std::memory_order_relaxed) == kIdle;
}

int team_workers(int64_t cost_bytes, int64_t num_tasks) {
  if (num_tasks <= 1 || cost_bytes < kSerialCost) return 1;
  if (cost_bytes < kSerialCostAsleep && !team_is_awake()) return 1;
  return static_cast<int>(std::min<int64_t>(team_size(), num_tasks));
}

void pause_in_spin(int64_t i) {
  if (i < kLooksBeforeYield) {
    pause_cpu();
  } else {
    sched_yield();
  }
}

void team_run_raw(int num_workers, TeamWork work, void* context) {
  if (num_workers <= 1) return run_alone(num_workers, work, context);
  Team& self = team();
  if (self.busy.exchange(true, std::memory_order_acquire)) {
    return run_alone(num_workers, work, context);
  }
  const int num_helpers = self.grow(std::min(num_workers, kTeamMax) - 1);
  for (int i = 0; i < num_helpers; ++i) self.helpers[i].post(i + 1, work, context);
  if (self.num_used.load(std::memory_order_relaxed) < num_helpers) {
    self.num_used.store(num_helpers, std::memory_order_relaxed);
  }
  std::exception_ptr error;
  const auto run_one = [&](int worker) {
    try {
      work(context, worker);
    } catch (...) {
      if (!error) error = std::current_exception();
    }
  };
  run_one(0);
  for (int worker = num_helpers + 1; worker < num_workers; ++worker) run_one(worker);
  for (int i = 0; i < num_helpers; ++i) {
    if (self.helpers[i].take_back()) run_one(i + 1);
  }
  for (int i = 0; i < num_helpers; ++i) {
    self.helpers[i].wait();
    if (self.helpers[i].error) {
      if (!error) error = self.helpers[i].error;
      self.helpers[i].error = nullptr;
    }
  }
  self.busy.store(false, std::memory_order_release);
  if (error) std::rethrow_exception(error);
}

void team_park() {
  Team& self = team();
  const int num_helpers = self.num_helpers.load(std::memory_order_relaxed);
  for (int i = 0; i < num_helpers; ++i) {
    uint32_t seen = kIdle;
    self.helpers[i].state.compare_exchange_strong(seen, kParked);
  }
}

void team_wake() {
  Team& self = team();
  const int num_used = self.num_used.exchange(0, std::memory_order_relaxed);
  for (int i = 0; i < num_used; ++i) self.helpers[i].wake();
}

namespace {

// For tests: how often each of `num_workers` was called, and in how many threads; `throw_in` throws.
std::vector<int64_t> team_probe(int64_t num_workers, int64_t throw_in) {
  std::vector<int64_t> calls(num_workers + 1, 0);
  std::mutex mutex;
  std::vector<pthread_t> threads;
  team_run(static_cast<int>(num_workers), [&](int worker) {
    const std::lock_guard<std::mutex> lock(mutex);
    ++calls[worker];
    const pthread_t here = pthread_self();
    bool known = false;
    for (const pthread_t thread : threads) known = known || pthread_equal(thread, here);
    if (!known) threads.push_back(here);
    TORCH_CHECK(worker != throw_in, "worker ", worker, " was asked to fail");
  });
  calls[num_workers] = static_cast<int64_t>(threads.size());
  return calls;
}

// For tests: tasks as these workers take them, one after the other, and what each expects to be next.
std::tuple<std::vector<int64_t>, std::vector<int64_t>> task_runs_probe(
    int64_t num_tasks, int64_t num_workers, const std::vector<int64_t>& takers) {
  TaskRuns runs(num_tasks, static_cast<int>(num_workers));
  std::vector<int64_t> tasks, nexts;
  for (const int64_t worker : takers) {
    const TaskRuns::Taken taken = runs.take(static_cast<int>(worker));
    tasks.push_back(taken.task);
    nexts.push_back(taken.next);
  }
  return {tasks, nexts};
}

int64_t team_park_address() { return reinterpret_cast<int64_t>(&remora_team_park); }
int64_t team_wake_address() { return reinterpret_cast<int64_t>(&remora_team_wake); }

}  // namespace
}  // namespace remora

extern "C" void remora_team_park() { remora::team_park(); }
extern "C" void remora_team_wake() { remora::team_wake(); }

TORCH_LIBRARY_FRAGMENT(remora, m) {
  m.def("team_park() -> ()", &remora::team_park);
  m.def("team_park_address() -> int", &remora::team_park_address);
  m.def("team_wake() -> ()", &remora::team_wake);
  m.def("team_wake_address() -> int", &remora::team_wake_address);
  m.def("team_probe(int num_workers, int throw_in) -> int[]", &remora::team_probe);
  m.def("task_runs_probe(int num_tasks, int num_workers, int[] takers) -> (int[], int[])",
        &remora::task_runs_probe);
}
