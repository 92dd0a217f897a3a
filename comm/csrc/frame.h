// Frames as `comm/wire.py` defines them, and the counters that both languages write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "crc32.h"

namespace remora {

constexpr uint64_t kHeaderBytes = 64;
constexpr uint64_t kPairBytes = 12;
constexpr uint8_t kVersion = 1;
enum Kind : uint8_t { kDispatch = 1, kCombined = 2, kKindMax = 7 };
enum Flag : uint16_t { kArena = 1, kPresummed = 2, kChecked = 4, kFlagsAll = 7 };
enum Dtype : uint8_t { kFloat32 = 1, kBfloat16 = 2 };

// `wire._HEADER`, field by field; the host is little endian (`wire` refuses others).
struct Header {
  uint8_t magic[2];
  uint8_t version;
  uint8_t kind;
  uint16_t flags;
  uint16_t layer;
  uint32_t length;
  uint32_t num_rows;
  uint32_t num_pairs;
  uint16_t width;
  uint8_t dtype;
  uint8_t region;
  uint64_t epoch;
  uint64_t incarnation;
  uint64_t sequence;
  uint32_t deadline_us;
  uint32_t reply_offset;
  uint32_t body_crc;
  uint32_t header_crc;

  uint64_t inline_bytes() const { return flags & kArena ? 0 : length; }
};
static_assert(sizeof(Header) == kHeaderBytes, "the wire's header has 64 bytes");
static_assert(offsetof(Header, epoch) == 24 && offsetof(Header, body_crc) == 56, "no padding");

constexpr size_t kCheckedBytes = offsetof(Header, header_crc);

// `accounting.LinkCounters`; `module.cpp` tells Python the size and it compares.
struct Counters {
  int64_t sent_frames, sent_bytes, sent_rows, sent_pairs;
  int64_t received_frames, received_bytes, received_rows;
  int64_t arena_bytes, late_replies, stale_replies, not_mine, deadlines, losses;
};

inline uint64_t item_bytes(uint8_t dtype) {
  return dtype == kFloat32 ? 4 : dtype == kBfloat16 ? 2 : 0;
}
inline uint64_t align64(uint64_t bytes) { return (bytes + 63) & ~uint64_t{63}; }
inline uint64_t pairs_offset(uint64_t num_rows, uint64_t row_bytes) {
  return (num_rows * row_bytes + 3) & ~uint64_t{3};
}
inline uint64_t dispatch_bytes(uint64_t num_rows, uint64_t num_pairs, uint64_t row_bytes) {
  return pairs_offset(num_rows, row_bytes) + kPairBytes * num_pairs;
}

// Fills in what is the same in every header and the checksum.
inline void seal(Header& header) {
  header.magic[0] = 'R';
  header.magic[1] = 'M';
  header.version = kVersion;
  header.header_crc = crc32(0, &header, kCheckedBytes);
}

// What `wire.decode_header` accepts.
inline bool is_frame(const Header& header, uint64_t frame_bytes_max) {
  return header.magic[0] == 'R' && header.magic[1] == 'M' && header.version == kVersion &&
         header.header_crc == crc32(0, &header, kCheckedBytes) && header.kind >= 1 &&
         header.kind <= kKindMax && !(header.flags & ~kFlagsAll) && header.dtype <= kBfloat16 &&
         kHeaderBytes + header.length <= frame_bytes_max;
}

}  // namespace remora
