// One layer's dispatch and combine over connected peers, as long as all goes well.
//
// Whatever else happens (an error frame, a stale answer, a lost peer, a deadline, no credit) is not
// decided here: the layer stops where it is, `calls()` and `link()` say how far it came, and Python
// (`comm/native_dispatch.py`) goes on from there with the objects of `comm/peer.py`.
#pragma once

#include <poll.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "frame.h"
#include "plan.h"

namespace remora {

// `peer.PeerCell`: what of a connection both languages write.
struct PeerCell {
  uint64_t sequence;  // of the last call
  uint64_t lost;      // not 0: the connection is gone
};

// A connection, as Python described it when it was last settled.
struct Link {
  int fd = -1;
  PeerCell* cell = nullptr;  // null: not connected, never chosen
  Counters* counters = nullptr;
  char* memory = nullptr;  // the arena, or private memory of the same layout
  uint64_t region_bytes = 0;
  uint64_t frame_bytes_max = 0;
  uint64_t arena_bytes_min = 0;
  uint64_t incarnation = 0;
  bool arena = false;
  bool checked = false;
  std::vector<int32_t> free_regions;  // the last is taken first, as `Peer._free`

  // of the layer under way
  std::vector<int32_t> calls;  // in order of sequence
  size_t num_sent = 0;         // of `calls`, left completely
  size_t num_answered = 0;
  bool failed = false;   // its socket failed: Python meets the failure again and books it
  bool damaged = false;  // a body's checksum is wrong
};

struct LayerCall {
  int32_t shard;
  uint32_t num_rows, num_pairs, num_back;
  int32_t region;
  char* frame;  // header and body
  char* reply;
  uint64_t body_bytes, reply_bytes;
  uint64_t frame_bytes;  // of those that go through the socket
  uint64_t sent;
  bool shared;
  uint64_t sequence;
  Header head;      // of the answer
  uint64_t received;  // bytes of header and inline body
  bool counted;     // the answer's header was taken and counted
  bool answered;
};

struct LayerInput {
  int32_t layer;
  int64_t num_tokens, num_rows, top_k, width;  // num_rows: T, padding included
  uint8_t dtype;
  bool weight_bfloat16;
  const char* hidden;
  const int64_t* index_TK;
  const void* weight_TK;
};

enum class Status { kDone = 0, kNotNative = 1, kHandOver = 2 };

// Nanoseconds, ever growing.
struct Phases {
  int64_t pack_ns = 0, wait_ns = 0, combine_ns = 0, experts_compute_ns = 0;
  int64_t layers = 0;
};

class Client {
 public:
  // What stays the same for a view.
  uint64_t epoch = 0;
  bool presummed = false;
  double deadline_s = 0;
  int64_t rows_per_call_max = 1, region_bytes_asked = 0;
  ShardTable shards;
  const uint64_t* settled = nullptr;  // 0: what we know of view and connections may be gone
  void (*park)() = nullptr;  // called before other processes get work: the cores are theirs then
  void (*wake)() = nullptr;  // called when they have answered: the cores are ours again
  std::unordered_map<int32_t, ReplicaTable> tables;
  std::vector<Link> links;
  Phases phases;

  // Chooses, packs and sends. kNotNative: nothing has left, nothing is changed.
  Status begin(const LayerInput& input);
  // Waits and sums into `out`. kHandOver: see above; `until_ns` is when the deadline ends.
  Status finish(char* out);

  const Layout& layout() const { return layout_; }
  const std::vector<LayerCall>& calls() const { return calls_; }
  bool is_open() const { return open_; }
  void close() { open_ = false; }
  int64_t until_ns() const { return until_ns_; }
  // Of `shard`: what came of an answer that was not taken, as it came.
  std::string unread(int32_t shard) const;

 private:
  int64_t rows_max(int64_t out, int64_t back) const;
  bool place(const LayerInput& input);
  void send_all();
  void send_some(Link& link);
  bool wait();
  bool receive(Link& link);
  bool take_header(Link& link, LayerCall& call);
  bool take_body(Link& link, LayerCall& call);

  LayerInput input_{};
  Chooser chooser_;
  Layout layout_;
  std::vector<float> weight_TK_;
  std::vector<LayerCall> calls_;
  std::vector<char*> column_C_;
  std::vector<const char*> reply_C_;
  std::vector<pollfd> polls_;
  std::vector<Link*> polled_;
  int64_t until_ns_ = 0;
  bool open_ = false;
};

int64_t now_ns();

}  // namespace remora
