// A shard's ordinary calls, from the socket to the kernel and back, without Python in between.
//
// The pump waits on the server's epoll set. Of the connections that it owns it takes DISPATCH
// frames and answers them; everything else (other descriptors, other kinds of frame, whatever is
// not as it should be, a call that the kernel refuses) is Python's: the connection is handed over
// with its bytes untouched in Python's own receive memory, and `comm/server.py` judges and answers.
//
// Bytes come from peers that proved to know the token, and may still be wrong: every size is
// checked here, and pairs are copied out of memory that the peer can write before they are.
#pragma once

#include <sys/epoll.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "expert_call.h"  // of kernels/csrc
#include "frame.h"

namespace remora {

// A connection while the pump owns it.
struct PumpLink {
  int fd = -1;
  char* rx = nullptr;  // Python's receive memory; bytes from its start to `rx_end`
  uint64_t rx_bytes = 0;
  uint64_t rx_end = 0;
  char* arena = nullptr;  // null: none
  uint64_t num_regions = 0;
  uint64_t region_bytes = 0;
  uint64_t frame_bytes_max = 0;
  uint64_t last_call = 0;  // sequence
  Counters* counters = nullptr;

  bool has_head = false;  // a complete, valid DISPATCH lies at the start of `rx`
  Header head;
  uint32_t skipped = 0;  // times another connection's frame went ahead
};

// What Python has to look at.
struct PumpEvent {
  int fd;
  uint32_t events;  // of epoll; 0: nothing new on the socket
  bool handed;      // the connection is Python's again, with the two below
  uint64_t rx_end;
  uint64_t last_call;
  std::string unsent;  // of an answer: to be queued before anything else is sent
};

class Pump {
 public:
  RemoraExpertsFn entry = nullptr;
  void* shard = nullptr;
  uint8_t dtype = 0;
  uint64_t width = 0;
  uint64_t incarnation = 0;
  uint64_t epoch = 0;
  uint32_t skips_max = 4;
  uint64_t merge_rows_max = 128;
  void (*park)() = nullptr;  // called before this thread sleeps: the cores are others' now
  // read by other threads
  std::atomic<int64_t> calls_served = 0, batches = 0, compute_ns = 0;

  // Takes a connection over; it must be settled: no byte received, none queued.
  void give(const PumpLink& link) { links_[link.fd] = link; }
  // Takes it away; false when it was not the pump's.
  bool take(int fd, PumpEvent& event);
  // Serves until there is something for Python, or `timeout_s` (< 0: none) has passed; with
  // timeout 0 at most one batch.
  std::vector<PumpEvent> poll(int epoll_fd, double timeout_s);

 private:
  struct Work {
    PumpLink* link;
    char* frame;  // of an inline answer: header and rows; null in the arena
    uint64_t out_bytes;
    uint64_t num_back;
  };

  void read(PumpLink& link);
  void parse(PumpLink& link);
  bool is_ours(const PumpLink& link) const;
  bool pairs_fit(const PumpLink& link) const;
  bool any_head() const;
  void pick();
  void serve();
  void prepare(PumpLink& link, uint64_t scratch_at);
  void answer(Work& work, uint32_t compute_us);
  void hand(PumpLink& link, uint32_t events);
  const char* body(const PumpLink& link) const;
  bool in_arena(const PumpLink& link, uint64_t out_bytes) const;

  std::unordered_map<int, PumpLink> links_;
  std::vector<PumpEvent> events_;
  std::vector<PumpLink*> batch_;
  std::vector<Work> work_;
  std::vector<RemoraExpertCall> calls_;
  std::deque<std::vector<int32_t>> pairs_;  // row, expert, weight columns of each call
  std::vector<char> scratch_;
};

}  // namespace remora
