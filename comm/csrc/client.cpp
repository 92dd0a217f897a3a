#include "client.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

namespace remora {
namespace {

// Of an answer's body, read together with its header: what is not understood must fit Python's
// receive memory (peer.RECEIVE_BYTES) again.
constexpr uint64_t kFirstBodyBytes = 128 << 10;

Routing routing_of(const LayerInput& input, const float* weight_TK) {
  return {input.index_TK, weight_TK, input.num_tokens, input.top_k};
}

}  // namespace

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

Status Client::begin(const LayerInput& input) {
  const int64_t begun_ns = now_ns();
  // A layer of this step that Python served may have taken another view: tables are freed then.
  if (!settled || !*settled) return Status::kNotNative;
  for (const Link& link : links)
    if (link.cell && link.cell->lost) return Status::kNotNative;
  const auto table = tables.find(input.layer);
  if (table == tables.end() || input.layer > UINT16_MAX || input.width > UINT16_MAX ||
      input.width < 1 || input.num_tokens > INT32_MAX)
    return Status::kNotNative;
  // A core where a thread of the kernels still spins is not given to a shard: they are asleep by the
  // time that all is packed.
  if (park) park();
  input_ = input;
  const int64_t num_pairs = input.num_tokens * input.top_k;
  const auto* weight_TK = static_cast<const float*>(input.weight_TK);
  if (input.weight_bfloat16) {
    weight_TK_.resize(num_pairs);
    const auto* bits_TK = static_cast<const uint16_t*>(input.weight_TK);
    for (int64_t p = 0; p < num_pairs; ++p)
      weight_TK_[p] = std::bit_cast<float>(uint32_t{bits_TK[p]} << 16);
    weight_TK = weight_TK_.data();
  }
  input_.weight_TK = weight_TK;
  const Routing routing = routing_of(input, weight_TK);
  const auto num_shards = static_cast<int64_t>(links.size());
  layout_.resize(routing);
  int32_t* shard_TK = layout_.shard_TK.data();
  int32_t* call_TK = layout_.call_TK.data();
  if (!chooser_.choose(routing, table->second, shards, shard_TK, call_TK))
    return Status::kNotNative;
  const auto row_bytes = static_cast<int64_t>(input.width * item_bytes(input.dtype));
  const int64_t out = row_bytes + static_cast<int64_t>(kPairBytes) * input.top_k;
  const int64_t back = row_bytes * (presummed ? 1 : input.top_k);
  layout_.lay_out(routing, table->second.num_experts, num_shards, rows_max(out, back));
  if (!place(input)) return Status::kNotNative;
  chooser_.settle(routing, table->second, shards, shard_TK, call_TK);
  layout_.pack_pairs(routing, column_C_);
  open_ = true;
  send_all();
  phases.pack_ns += now_ns() - begun_ns;
  return Status::kDone;
}

// Rows of a call, as `PythonLayers._rows_max`; `out` and `back` are a row's bytes each way.
int64_t Client::rows_max(int64_t out, int64_t back) const {
  constexpr auto header_bytes = static_cast<int64_t>(kHeaderBytes);
  uint64_t frame_bytes_max = INT64_MAX;
  for (const Link& link : links)
    if (link.cell) frame_bytes_max = std::min(frame_bytes_max, link.frame_bytes_max);
  const int64_t in_region = (region_bytes_asked - 4 * header_bytes) / (out + back);
  const int64_t in_frame =
      (static_cast<int64_t>(frame_bytes_max) - 2 * header_bytes) / std::max(out, back);
  return std::max<int64_t>(1, std::min({rows_per_call_max, in_region, in_frame}));
}

// Gives every call its region; false when one has none, or its call fits none.
bool Client::place(const LayerInput& input) {
  for (Link& link : links) {
    link.calls.clear();
    link.num_sent = link.num_answered = 0;
    link.failed = link.damaged = false;
  }
  const uint64_t row_bytes = input.width * item_bytes(input.dtype);
  calls_.resize(layout_.num_calls);
  column_C_.resize(layout_.num_calls);
  for (int32_t c = 0; c < layout_.num_calls; ++c) {
    Link& link = links[layout_.call_shard_C[c]];
    LayerCall& call = calls_[c];
    if (!link.cell || link.calls.size() >= link.free_regions.size()) return false;
    call = LayerCall{};
    call.shard = layout_.call_shard_C[c];
    call.num_rows = static_cast<uint32_t>(layout_.call_rows_C[c]);
    call.num_pairs = static_cast<uint32_t>(layout_.call_pairs_C[c]);
    call.num_back = presummed ? call.num_rows : call.num_pairs;
    call.body_bytes = dispatch_bytes(call.num_rows, call.num_pairs, row_bytes);
    // a NOT_MINE must fit too
    call.reply_bytes = std::max<uint64_t>(call.num_back * row_bytes, 4 * uint64_t{call.num_pairs});
    const uint64_t reply_at = align64(kHeaderBytes + call.body_bytes);
    const uint64_t largest = std::max(call.body_bytes, call.reply_bytes);
    if (reply_at + call.reply_bytes > link.region_bytes ||
        kHeaderBytes + largest > link.frame_bytes_max)
      return false;
    call.region = link.free_regions[link.free_regions.size() - 1 - link.calls.size()];
    call.frame = link.memory + call.region * link.region_bytes;
    call.reply = call.frame + reply_at;
    call.shared = link.arena && largest >= link.arena_bytes_min;
    call.frame_bytes = kHeaderBytes + (call.shared ? 0 : call.body_bytes);
    column_C_[c] = call.frame + kHeaderBytes + pairs_offset(call.num_rows, row_bytes);
    link.calls.push_back(c);
  }
  return true;
}

// Header and rows of each call, then all of them away. The first shard of this host that wakes may
// take this very core, and keep it for a layer: nothing may be left to pack then.
void Client::send_all() {
  const uint64_t row_bytes = input_.width * item_bytes(input_.dtype);
  for (int32_t c = 0; c < layout_.num_calls; ++c) {
    LayerCall& call = calls_[c];
    Link& link = links[call.shard];
    char* body = call.frame + kHeaderBytes;
    layout_.pack_rows(c, input_.hidden, row_bytes, body);
    call.sequence = ++link.cell->sequence;
    Header header{};
    header.kind = kDispatch;
    header.flags = presummed ? kPresummed : 0;
    header.layer = static_cast<uint16_t>(input_.layer);
    header.length = static_cast<uint32_t>(call.body_bytes);
    header.num_rows = call.num_rows;
    header.num_pairs = call.num_pairs;
    header.width = static_cast<uint16_t>(input_.width);
    header.dtype = input_.dtype;
    header.epoch = epoch;
    header.incarnation = link.incarnation;
    header.sequence = call.sequence;
    header.deadline_us = static_cast<uint32_t>(std::min(deadline_s * 1e6, 4294967295.0));
    if (call.shared) {
      header.flags |= kArena;
      header.region = static_cast<uint8_t>(call.region);
      header.reply_offset = static_cast<uint32_t>(call.reply - call.frame);
      link.counters->arena_bytes += call.body_bytes;
    } else if (link.checked) {
      header.flags |= kChecked;
      header.body_crc = crc32(0, body, call.body_bytes);
    }
    seal(header);
    std::memcpy(call.frame, &header, kHeaderBytes);
    link.counters->sent_frames += 1;
    link.counters->sent_bytes += kHeaderBytes + call.body_bytes;
    link.counters->sent_rows += call.num_rows;
    link.counters->sent_pairs += call.num_pairs;
  }
  for (Link& link : links) send_some(link);
}

// What the socket takes now, in order. A failure shows again to Python, which books it.
void Client::send_some(Link& link) {
  while (link.num_sent < link.calls.size() && !link.failed) {
    LayerCall& call = calls_[link.calls[link.num_sent]];
    const ssize_t sent = send(link.fd, call.frame + call.sent, call.frame_bytes - call.sent,
                              MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno != EAGAIN && errno != EINTR) link.failed = true;
      return;
    }
    call.sent += static_cast<uint64_t>(sent);
    if (call.sent < call.frame_bytes) return;
    ++link.num_sent;
  }
}

Status Client::finish(char* out) {
  const int64_t begun_ns = now_ns();
  until_ns_ = begun_ns + static_cast<int64_t>(deadline_s * 1e9);
  const bool answered = wait();
  const int64_t answered_ns = now_ns();
  phases.wait_ns += answered_ns - begun_ns;
  if (!answered) return Status::kHandOver;
  if (wake) wake();
  reply_C_.resize(calls_.size());
  uint32_t compute_us = 0;
  for (size_t c = 0; c < calls_.size(); ++c) {
    reply_C_[c] = calls_[c].reply;
    compute_us = std::max(compute_us, calls_[c].head.deadline_us);
  }
  const auto* weight_TK = static_cast<const float*>(input_.weight_TK);
  combine(layout_, routing_of(input_, weight_TK), input_.width, input_.dtype == kBfloat16,
          presummed, reply_C_, out, input_.num_rows);
  phases.combine_ns += now_ns() - answered_ns;
  phases.experts_compute_ns += int64_t{compute_us} * 1000;
  phases.layers += 1;
  open_ = false;
  return Status::kDone;
}

// Until every call is answered; false: Python goes on.
bool Client::wait() {
  polls_.resize(links.size());
  polled_.resize(links.size());
  while (true) {
    nfds_t count = 0;
    for (Link& link : links) {
      if (link.num_answered == link.calls.size()) continue;
      if (link.failed || link.damaged) return false;
      const bool unsent = link.num_sent < link.calls.size();
      polled_[count] = &link;
      polls_[count++] = {link.fd, static_cast<short>(unsent ? POLLIN | POLLOUT : POLLIN), 0};
    }
    if (count == 0) return true;
    const int64_t left_ns = std::max<int64_t>(0, until_ns_ - now_ns());
    const timespec left{left_ns / 1'000'000'000, left_ns % 1'000'000'000};
    const int ready = ppoll(polls_.data(), count, &left, nullptr);
    if (ready < 0) return false;  // a signal: its handler is Python's
    if (ready == 0 && now_ns() >= until_ns_) return false;
    for (nfds_t i = 0; i < count && ready > 0; ++i) {
      if (polls_[i].revents & POLLOUT) send_some(*polled_[i]);
      if (polls_[i].revents & ~POLLOUT && !receive(*polled_[i])) return false;
    }
  }
}

// Receives once for the next call of `link`; false: what came is not for us to decide.
bool Client::receive(Link& link) {
  LayerCall& call = calls_[link.calls[link.num_answered]];
  const uint64_t row_bytes = input_.width * item_bytes(input_.dtype);
  const uint64_t expected = call.shared ? 0 : call.num_back * row_bytes;
  iovec parts[2];
  int num_parts = 0;
  uint64_t in_body = 0;
  if (call.received < kHeaderBytes) {
    parts[num_parts++] = {reinterpret_cast<char*>(&call.head) + call.received,
                          kHeaderBytes - call.received};
  } else {
    in_body = call.received - kHeaderBytes;
  }
  const uint64_t bound = call.counted ? expected : std::min(expected, kFirstBodyBytes);
  if (bound > in_body) parts[num_parts++] = {call.reply + in_body, bound - in_body};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = num_parts;
  const ssize_t received = recvmsg(link.fd, &message, MSG_DONTWAIT);
  if (received <= 0) return received < 0 && (errno == EAGAIN || errno == EINTR);
  call.received += static_cast<uint64_t>(received);
  if (call.received < kHeaderBytes) return true;
  if (!call.counted && !take_header(link, call)) return false;
  return call.received < kHeaderBytes + expected || take_body(link, call);
}

// As `Peer._match` and `Dispatcher._take`: counts an answer that is just what is expected.
bool Client::take_header(Link& link, LayerCall& call) {
  const Header& head = call.head;
  const uint64_t length = call.num_back * input_.width * item_bytes(input_.dtype);
  if (!is_frame(head, link.frame_bytes_max) || head.kind != kCombined ||
      head.sequence != call.sequence || head.incarnation != link.incarnation ||
      head.num_rows != call.num_back || head.length != length)
    return false;
  const bool in_arena = head.flags & kArena;
  if (in_arena != call.shared) return false;
  if (in_arena && (head.flags & kChecked || head.region != call.region ||
                   head.reply_offset != static_cast<uint64_t>(call.reply - call.frame)))
    return false;
  call.counted = true;
  Counters& counters = *link.counters;
  counters.received_frames += 1;
  counters.received_bytes += kHeaderBytes + head.length;
  counters.received_rows += head.num_rows;
  if (in_arena) counters.arena_bytes += head.length;
  return true;
}

bool Client::take_body(Link& link, LayerCall& call) {
  const Header& head = call.head;
  if (head.flags & kChecked && crc32(0, call.reply, head.length) != head.body_crc) {
    link.damaged = true;
    return false;
  }
  call.answered = true;
  ++link.num_answered;
  return true;
}

std::string Client::unread(int32_t shard) const {
  const Link& link = links[shard];
  if (link.num_answered == link.calls.size()) return {};
  const LayerCall& call = calls_[link.calls[link.num_answered]];
  if (call.counted) return {};  // its body lies where it belongs
  std::string bytes(reinterpret_cast<const char*>(&call.head),
                    std::min(call.received, kHeaderBytes));
  if (call.received > kHeaderBytes) bytes.append(call.reply, call.received - kHeaderBytes);
  return bytes;
}

}  // namespace remora
