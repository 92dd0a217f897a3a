#include "crc32.h"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace remora {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;
using Tables = std::array<std::array<uint32_t, 256>, 8>;

// table[k][b]: byte `b` followed by `k` zero bytes.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int i = 0; i < 8; ++i) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
    tables[0][b] = crc;
  }
  for (uint32_t b = 0; b < 256; ++b)
    for (size_t k = 1; k < 8; ++k)
      tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 0xFF];
  return tables;
}

constexpr Tables kTables = make_tables();

// Eight bytes a turn; `crc` is inverted, in and out.
uint32_t by_tables(uint32_t crc, const uint8_t* data, size_t size) {
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    word ^= crc;
    crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= kTables[7 - k][(word >> (8 * k)) & 0xFF];
  }
  for (; size; ++data, --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 0xFF];
  return crc;
}

#if defined(__x86_64__)
// x^n mod P in the reflected domain, for the distance that a fold carries a lane.
constexpr uint64_t power(unsigned n) {
  uint32_t value = 0x80000000u;  // x^0
  for (unsigned i = 0; i < n; ++i) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
  return uint64_t{value} << 1;  // a reflected carry-less product comes out one bit low
}

constexpr uint64_t kFold512[2] = {power(512 + 32), power(512 - 32)};
constexpr uint64_t kFold128[2] = {power(128 + 32), power(128 - 32)};
static_assert(kFold512[0] == 0x154442bd4u && kFold128[0] == 0x1751997d0u, "published constants");

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i lane, __m128i by, __m128i in) {
  const __m128i low = _mm_clmulepi64_si128(lane, by, 0x00);
  const __m128i high = _mm_clmulepi64_si128(lane, by, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), in);
}

inline __m128i load(const uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// Folds 64 bytes a turn (Gopal et al., "Fast CRC computation using PCLMULQDQ", 2009) and leaves
// the last 16 to the tables, which spares the reduction. `size` >= 64.
__attribute__((target("pclmul,sse4.1"))) uint32_t by_folding(uint32_t crc, const uint8_t* data,
                                                             size_t size) {
  __m128i lane[4];
  for (int i = 0; i < 4; ++i) lane[i] = load(data + 16 * i);
  lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  data += 64, size -= 64;
  const __m128i far = _mm_set_epi64x(static_cast<int64_t>(kFold512[1]),
                                     static_cast<int64_t>(kFold512[0]));
  for (; size >= 64; data += 64, size -= 64)
    for (int i = 0; i < 4; ++i) lane[i] = fold(lane[i], far, load(data + 16 * i));
  const __m128i near = _mm_set_epi64x(static_cast<int64_t>(kFold128[1]),
                                      static_cast<int64_t>(kFold128[0]));
  __m128i all = fold(lane[0], near, lane[1]);
  all = fold(all, near, lane[2]);
  all = fold(all, near, lane[3]);
  for (; size >= 16; data += 16, size -= 16) all = fold(all, near, load(data));
  alignas(16) uint8_t rest[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), all);
  return by_tables(by_tables(0, rest, 16), data, size);
}
#endif

}  // namespace

uint32_t crc32(uint32_t crc, const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
#if defined(__x86_64__)
  static const bool folds = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (folds && size >= 128) return ~by_folding(~crc, bytes, size);
#endif
  return ~by_tables(~crc, bytes, size);
}

}  // namespace remora
