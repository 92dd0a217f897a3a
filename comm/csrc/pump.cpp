#include "pump.h"

#include <sys/socket.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "choice.h"

namespace remora {
namespace {

constexpr int kEventsMax = 64;

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

uint64_t rows_back(const Header& head) {
  return head.flags & kPresummed ? head.num_rows : head.num_pairs;
}

}  // namespace

bool Pump::take(int fd, PumpEvent& event) {
  const auto found = links_.find(fd);
  if (found == links_.end()) return false;
  event = {fd, 0, true, found->second.rx_end, found->second.last_call, {}};
  links_.erase(found);
  return true;
}

// Python goes on with this connection: what was received stays where it is.
void Pump::hand(PumpLink& link, uint32_t events) {
  events_.push_back({link.fd, events, true, link.rx_end, link.last_call, {}});
  links_.erase(link.fd);
}

std::vector<PumpEvent> Pump::poll(int epoll_fd, double timeout_s) {
  events_.clear();
  const bool bounded = timeout_s >= 0;
  const int64_t begun_ns = now_ns();
  const int64_t until_ns = begun_ns + static_cast<int64_t>((bounded ? timeout_s : 0) * 1e9);
  bool served = true;  // Python may have computed before it called
  epoll_event ready[kEventsMax];
  while (true) {
    int wait_ms = bounded ? 0 : -1;
    if (any_head()) {
      wait_ms = 0;
    } else if (bounded && timeout_s > 0) {
      wait_ms = static_cast<int>(std::max<int64_t>(0, (until_ns - now_ns() + 999'999) / 1'000'000));
    }
    if (wait_ms && served && park) park();
    const int count = epoll_wait(epoll_fd, ready, kEventsMax, wait_ms);
    served = false;
    if (count < 0) break;  // a signal: its handler is Python's
    for (int i = 0; i < count; ++i) {
      const auto found = links_.find(ready[i].data.fd);
      if (found == links_.end())
        events_.push_back({ready[i].data.fd, ready[i].events, false, 0, 0, {}});
      else if (ready[i].events & ~EPOLLIN)
        hand(found->second, ready[i].events);
      else if (!found->second.has_head)
        read(found->second);  // else its next frame waits for its turn
    }
    if (any_head()) {
      serve();
      served = true;
    }
    if (!events_.empty() || timeout_s == 0) break;
    if (bounded && now_ns() >= until_ns) break;
  }
  return std::move(events_);
}

bool Pump::any_head() const {
  for (const auto& [fd, link] : links_)
    if (link.has_head) return true;
  return false;
}

void Pump::read(PumpLink& link) {
  const ssize_t received =
      recv(link.fd, link.rx + link.rx_end, link.rx_bytes - link.rx_end, MSG_DONTWAIT);
  if (received < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (received <= 0) return hand(link, EPOLLIN);  // Python meets the end again and books it
  link.rx_end += static_cast<uint64_t>(received);
  parse(link);
}

// Sets `has_head`, waits for more, or hands the connection over.
void Pump::parse(PumpLink& link) {
  if (link.rx_end < kHeaderBytes) return;
  std::memcpy(&link.head, link.rx, kHeaderBytes);
  const Header& head = link.head;
  if (!is_frame(head, link.frame_bytes_max) || !is_ours(link)) return hand(link, 0);
  const uint64_t total = kHeaderBytes + head.inline_bytes();
  if (total > link.rx_bytes) return hand(link, 0);  // Python makes room
  if (link.rx_end < total) return;
  const bool damaged = head.flags & kChecked && !(head.flags & kArena) &&
                       crc32(0, body(link), head.length) != head.body_crc;
  if (damaged || !pairs_fit(link)) return hand(link, 0);
  link.has_head = true;
}

// A call as our requesters make them, within what was granted; else Python says what is wrong.
bool Pump::is_ours(const PumpLink& link) const {
  const Header& head = link.head;
  if (head.kind != kDispatch || head.sequence <= link.last_call || head.dtype != dtype ||
      head.width != width || (incarnation && head.incarnation != incarnation))
    return false;
  const uint64_t row_bytes = width * item_bytes(dtype);
  if (head.length != dispatch_bytes(head.num_rows, head.num_pairs, row_bytes) ||
      head.num_pairs > uint64_t{head.num_rows} * kTopKMax)  // a kernel's memory goes by pairs
    return false;
  if (head.flags & kArena &&
      (!link.arena || head.region >= link.num_regions || head.flags & kChecked ||
       kHeaderBytes + head.length > link.region_bytes || head.reply_offset > link.region_bytes ||
       head.reply_offset % 64))
    return false;
  const uint64_t out_bytes = rows_back(head) * row_bytes;
  return in_arena(link, out_bytes) || kHeaderBytes + out_bytes <= link.frame_bytes_max;
}

bool Pump::in_arena(const PumpLink& link, uint64_t out_bytes) const {
  return link.head.flags & kArena && link.head.reply_offset + out_bytes <= link.region_bytes;
}

const char* Pump::body(const PumpLink& link) const {
  const char* frame = link.head.flags & kArena
                          ? link.arena + link.head.region * link.region_bytes
                          : link.rx;
  return frame + kHeaderBytes;
}

// Told early, while Python can still answer; `prepare` judges the copy that the kernel reads.
bool Pump::pairs_fit(const PumpLink& link) const {
  const Header& head = link.head;
  const char* column = body(link) + pairs_offset(head.num_rows, width * item_bytes(dtype));
  bool fit = true;
  for (uint32_t p = 0; p < head.num_pairs; ++p) {
    uint32_t row;
    std::memcpy(&row, column + 4 * uint64_t{p}, 4);
    fit &= row < head.num_rows;
  }
  return fit;
}

// Fills `batch_`: whoever was passed over too often, else the smallest; then small calls of the
// same layer as far as the bound goes.
void Pump::pick() {
  batch_.clear();
  for (auto& [fd, link] : links_)
    if (link.has_head) batch_.push_back(&link);
  std::sort(batch_.begin(), batch_.end(), [this](const PumpLink* a, const PumpLink* b) {
    const bool fresh_a = a->skipped < skips_max, fresh_b = b->skipped < skips_max;
    if (fresh_a != fresh_b) return fresh_b;
    return a->head.num_rows != b->head.num_rows ? a->head.num_rows < b->head.num_rows
                                                : a->fd < b->fd;
  });
  uint64_t num_rows = batch_[0]->head.num_rows;
  const uint16_t layer = batch_[0]->head.layer;
  size_t taken = 1;
  for (size_t i = 1; i < batch_.size(); ++i) {
    PumpLink* link = batch_[i];
    const Header& head = link->head;
    if (head.layer == layer && num_rows + head.num_rows <= merge_rows_max) {
      num_rows += head.num_rows;
      batch_[taken++] = link;
    } else {
      ++link->skipped;
    }
  }
  batch_.resize(taken);
}

// One batch: to the kernel and its answers out.
void Pump::serve() {
  pick();
  work_.clear();
  calls_.clear();
  const uint64_t row_bytes = width * item_bytes(dtype);
  uint64_t scratch = 0;
  for (PumpLink* link : batch_) scratch += align64(kHeaderBytes + rows_back(link->head) * row_bytes);
  if (scratch_.size() < scratch + 64) scratch_.resize(scratch + 64);
  while (pairs_.size() < batch_.size()) pairs_.emplace_back();
  uint64_t at = 0;
  for (PumpLink* link : batch_) {
    prepare(*link, at);
    at += align64(kHeaderBytes + rows_back(link->head) * row_bytes);
  }
  const int64_t begun_ns = now_ns();
  const int refused = entry(shard, batch_[0]->head.layer, calls_.data(),
                            static_cast<int32_t>(calls_.size()));
  const int64_t took_ns = now_ns() - begun_ns;
  if (refused) {
    for (PumpLink* link : batch_) hand(*link, 0);
    return;
  }
  compute_ns += took_ns;
  batches += 1;
  const auto took_us = static_cast<uint32_t>(std::min<int64_t>(took_ns / 1000, UINT32_MAX));
  for (Work& work : work_) answer(work, took_us);
}

// Describes one call to the kernel. Its pairs are copied: what was checked must be what is read,
// and an arena is writable for the peer. A row that changed meanwhile becomes row 0.
void Pump::prepare(PumpLink& link, uint64_t scratch_at) {
  const Header& head = link.head;
  const uint64_t row_bytes = width * item_bytes(dtype);
  Work work{&link, nullptr, 0, rows_back(head)};
  work.out_bytes = work.num_back * row_bytes;
  std::vector<int32_t>& pairs = pairs_[calls_.size()];
  const uint64_t num_pairs = head.num_pairs;
  pairs.resize(3 * num_pairs);
  if (num_pairs)
    std::memcpy(pairs.data(), body(link) + pairs_offset(head.num_rows, row_bytes),
                kPairBytes * num_pairs);
  for (uint64_t p = 0; p < num_pairs; ++p)
    if (static_cast<uint32_t>(pairs[p]) >= head.num_rows) pairs[p] = 0;
  RemoraExpertCall call{};
  call.rows = body(link);
  call.num_rows = head.num_rows;
  call.pair_row = pairs.data();
  call.pair_expert = pairs.data() + num_pairs;
  call.pair_weight = reinterpret_cast<const float*>(pairs.data() + 2 * num_pairs);
  call.num_pairs = static_cast<int64_t>(num_pairs);
  call.presummed = head.flags & kPresummed ? 1 : 0;
  if (in_arena(link, work.out_bytes)) {
    call.out = link.arena + head.region * link.region_bytes + head.reply_offset;
  } else {
    const auto base = (reinterpret_cast<uintptr_t>(scratch_.data()) + 63) & ~uintptr_t{63};
    work.frame = reinterpret_cast<char*>(base) + scratch_at;
    call.out = work.frame + kHeaderBytes;
  }
  calls_.push_back(call);
  work_.push_back(work);
}

// Sends one answer, counts both ways and goes to the connection's next frame.
void Pump::answer(Work& work, uint32_t compute_us) {
  PumpLink& link = *work.link;
  const Header head = link.head;
  Header reply{};
  reply.kind = kCombined;
  reply.layer = head.layer;
  reply.length = static_cast<uint32_t>(work.out_bytes);
  reply.num_rows = static_cast<uint32_t>(work.num_back);
  reply.width = head.width;
  reply.dtype = head.dtype;
  reply.epoch = epoch;
  reply.incarnation = incarnation;
  reply.sequence = head.sequence;
  reply.deadline_us = compute_us;
  uint64_t size = kHeaderBytes;
  const char* frame = reinterpret_cast<const char*>(&reply);
  if (!work.frame) {
    reply.flags = kArena;
    reply.region = head.region;
    reply.reply_offset = head.reply_offset;
    link.counters->arena_bytes += work.out_bytes;
    seal(reply);
  } else {
    if (head.flags & kChecked) {  // the requester chose
      reply.flags = kChecked;
      reply.body_crc = crc32(0, work.frame + kHeaderBytes, work.out_bytes);
    }
    seal(reply);
    std::memcpy(work.frame, &reply, kHeaderBytes);
    frame = work.frame;
    size += work.out_bytes;
  }
  Counters& counters = *link.counters;
  counters.received_frames += 1;
  counters.received_bytes += kHeaderBytes + head.length;
  counters.received_rows += head.num_rows;
  if (head.flags & kArena) counters.arena_bytes += head.length;
  counters.sent_frames += 1;
  counters.sent_bytes += kHeaderBytes + work.out_bytes;
  counters.sent_rows += static_cast<int64_t>(work.num_back);
  calls_served += 1;

  const uint64_t used = kHeaderBytes + head.inline_bytes();
  link.rx_end -= used;
  if (link.rx_end) std::memmove(link.rx, link.rx + used, link.rx_end);
  link.has_head = false;
  link.skipped = 0;
  link.last_call = head.sequence;
  const ssize_t sent = send(link.fd, frame, size, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent == static_cast<ssize_t>(size)) return parse(link);
  const bool waits = sent >= 0 || errno == EAGAIN || errno == EINTR;
  std::string unsent;
  if (waits) unsent.assign(frame + (sent > 0 ? sent : 0), size - (sent > 0 ? sent : 0));
  hand(link, waits ? 0 : EPOLLIN);  // a socket that failed: Python meets it when it reads
  events_.back().unsent = std::move(unsent);
}

}  // namespace remora
