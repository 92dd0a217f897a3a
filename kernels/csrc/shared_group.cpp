// Waiting and waking of a group that shares memory; see shared_group.h.
#include "shared_group.h"

#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace remora {
namespace {

constexpr int64_t kLookAroundNs = 10'000'000;  // a sleeper looks for dead peers this often

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Not the private kind: the word lies in memory of several processes.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, int64_t timeout_ns) {
  timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

inline bool reached(uint32_t published, uint32_t sequence) {
  return static_cast<int32_t>(published - sequence) >= 0;  // numbers may wrap
}

}  // namespace

SharedGroup::SharedGroup(char* base, int rank, int size, size_t capacity, int64_t spin_us,
                         int64_t deadline_ms, std::vector<int> peer_sockets,
                         std::vector<int> peer_ranks)
    : base_(base),
      header_(reinterpret_cast<GroupHeader*>(base)),
      rank_(rank),
      size_(size),
      capacity_(capacity),
      spin_ns_(spin_us * 1000),
      deadline_ns_(deadline_ms * 1'000'000),
      peer_sockets_(std::move(peer_sockets)),
      peer_ranks_(std::move(peer_ranks)) {}

char* SharedGroup::begin() {
  // A gather leaves without waiting where a rank only gave: the buffer's readers are waited for
  // here. They have read exchange s - 2 once they have published s - 1.
  for (int q = 0; q < size_; ++q) wait_for(q, sequence_);
  return base_ + kGroupHeaderBytes + (2 * rank_ + ((sequence_ + 1) & 1)) * capacity_;
}

void SharedGroup::publish(uint64_t tag) {
  ++sequence_;
  tag_ = tag;
  header_->lines[rank_].tags[sequence_ & 1].store(tag, std::memory_order_relaxed);
  std::atomic<uint32_t>& published = header_->lines[rank_].published;
  published.store(sequence_, std::memory_order_seq_cst);
  if (header_->sleepers.load(std::memory_order_seq_cst) != 0) futex_wake(published);
}

const char* SharedGroup::part(int rank) {
  wait_for(rank, sequence_);
  if (header_->lines[rank].tags[sequence_ & 1].load(std::memory_order_relaxed) != tag_) {
    fail("ranks " + std::to_string(rank_) + " and " + std::to_string(rank) +
         " do not agree on what is exchanged (slices of another order, or another call)");
  }
  return base_ + kGroupHeaderBytes + (2 * rank + (sequence_ & 1)) * capacity_;
}

void SharedGroup::wait_for(int rank, uint32_t sequence) {
  std::atomic<uint32_t>& published = header_->lines[rank].published;
  if (reached(published.load(std::memory_order_acquire), sequence)) return;
  const int64_t started = now_ns();
  do {
    for (int i = 0; i < 64; ++i) {
      if (reached(published.load(std::memory_order_acquire), sequence)) return;
      relax();
    }
  } while (now_ns() - started < spin_ns_);
  for (;;) {
    header_->sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = published.load(std::memory_order_seq_cst);
    const bool is_there = reached(seen, sequence);
    if (!is_there && header_->aborted.load(std::memory_order_seq_cst) == 0) {
      futex_wait(published, seen, kLookAroundNs);
    }
    header_->sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (is_there || reached(published.load(std::memory_order_acquire), sequence)) return;
    look_around(rank, started);
  }
}

void SharedGroup::look_around(int rank, int64_t started_ns) {
  if (header_->aborted.load(std::memory_order_acquire) != 0) throw GroupError(abort_text());
  for (size_t i = 0; i < peer_sockets_.size(); ++i) {
    pollfd look{peer_sockets_[i], POLLRDHUP, 0};
    if (poll(&look, 1, 0) > 0 && (look.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL))) {
      fail("rank " + std::to_string(peer_ranks_[i]) + " is gone");
    }
  }
  if (now_ns() - started_ns > deadline_ns_) {
    fail("rank " + std::to_string(rank) + " did not come to exchange " +
         std::to_string(sequence_) + " within " + std::to_string(deadline_ns_ / 1'000'000) +
         " ms (rank " + std::to_string(rank_) + " waits)");
  }
}

void SharedGroup::fail(const std::string& text) {
  abort(text);
  throw GroupError(abort_text());
}

void SharedGroup::abort(const std::string& text) {
  uint32_t nobody = 0;
  if (header_->abort_taken.compare_exchange_strong(nobody, 1)) {
    const size_t length = std::min(text.size(), kAbortTextBytes - 1);
    std::memcpy(header_->abort_text, text.data(), length);
    header_->abort_text[length] = '\0';
    header_->aborted.store(static_cast<uint32_t>(1 + rank_), std::memory_order_seq_cst);
  }
  for (int q = 0; q < size_; ++q) futex_wake(header_->lines[q].published);
}

std::string SharedGroup::abort_text() const {
  if (header_->aborted.load(std::memory_order_acquire) == 0) return "";
  return std::string(header_->abort_text, strnlen(header_->abort_text, kAbortTextBytes));
}

void SharedGroup::reset(uint32_t sequence) {
  for (int q = 0; q < size_; ++q) header_->lines[q].published.store(sequence);
  header_->aborted.store(0);
  header_->abort_taken.store(0);
  sequence_ = sequence;
}

}  // namespace remora
