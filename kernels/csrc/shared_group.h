// A few processes of one host that hand tensors to each other through one piece of shared memory.
//
// The memory is: a header page, then for every rank two buffers. Exchange number s of a group
// works on buffer s % 2: each rank copies its part into its own buffer, publishes s in its own
// counter and reads the others' parts once their counters have reached s. One wait is enough: a
// rank writes buffer s % 2 again in exchange s + 2, after all have published s + 1, hence read s.
//
// A rank that waits spins for a short while, then sleeps on the other's counter (futex), looks
// every few milliseconds whether a peer has died (its socket hung up) or given up (`abort`), and
// gives up itself at its deadline. Nothing is ever waited for without an end.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace remora {

constexpr int kRanksMax = 64;
constexpr size_t kAbortTextBytes = 480;
constexpr size_t kGroupHeaderBytes = 8192;

struct alignas(64) RankLine {
  std::atomic<uint32_t> published{0};  // the last exchange whose part lies in the buffer
  std::atomic<uint64_t> tags[2]{};     // what the part in each buffer is; equal on all ranks
};

struct GroupHeader {
  std::atomic<uint32_t> aborted{0};   // 1 + the rank that gave up; 0: nobody
  std::atomic<uint32_t> sleepers{0};  // ranks that may sleep on a counter
  char abort_text[kAbortTextBytes];   // why; written before `aborted`, by the one that wins it
  std::atomic<uint32_t> abort_taken{0};
  alignas(64) RankLine lines[kRanksMax];
};
static_assert(sizeof(GroupHeader) <= kGroupHeaderBytes);

struct GroupError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class SharedGroup {
 public:
  // `base`: the mapping, zeroed when the first rank sees it. `capacity`: bytes of one buffer, a
  // multiple of 64. `peer_sockets[i]` hangs up when rank `peer_ranks[i]` is gone.
  SharedGroup(char* base, int rank, int size, size_t capacity, int64_t spin_us, int64_t deadline_ms,
              std::vector<int> peer_sockets, std::vector<int> peer_ranks);

  static size_t bytes_needed(int size, size_t capacity) {
    return kGroupHeaderBytes + 2 * static_cast<size_t>(size) * capacity;
  }

  int rank() const { return rank_; }
  int size() const { return size_; }
  size_t capacity() const { return capacity_; }

  // Where this rank writes its part of the next exchange; waits until that buffer is free.
  char* begin();
  // Publishes the part written since `begin`. Every rank publishes the same `tag`: what they must
  // agree on (which rows are whose), or the exchange fails instead of mixing rows up.
  void publish(uint64_t tag = 0);
  // The part of `rank` in the exchange that was published last; waits for it.
  const char* part(int rank);

  // Why exchanges fail, for all ranks: the first text stays.
  void abort(const std::string& text);
  std::string abort_text() const;
  // Every rank to exchange number `sequence`, nothing aborted. No rank may be in an exchange.
  void reset(uint32_t sequence);
  void set_sequence(uint32_t sequence) { sequence_ = sequence; }
  uint32_t sequence() const { return sequence_; }

 private:
  void wait_for(int rank, uint32_t sequence);
  void look_around(int rank, int64_t started_ns);
  [[noreturn]] void fail(const std::string& text);

  char* base_;
  GroupHeader* header_;
  int rank_;
  int size_;
  size_t capacity_;
  int64_t spin_ns_;
  int64_t deadline_ns_;
  std::vector<int> peer_sockets_;
  std::vector<int> peer_ranks_;
  uint32_t sequence_ = 0;
  uint64_t tag_ = 0;  // of the exchange that was published last
};

}  // namespace remora
