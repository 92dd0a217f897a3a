#include "int4.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "buffer.h"
#include "scalar.h"

namespace remora {
namespace {

inline PlainInt4Scales scales_of(const uint8_t* bytes) {
  PlainInt4Scales scales;
  for (int column = 0; column < kPanel; ++column) {
    const uint32_t exponent = 127 + kInt4Exponent - (bytes[column] >> 2);
    const uint32_t bits = exponent << 23 | (bytes[column] & 3u) << 21;
    std::memcpy(scales.of + column, &bits, sizeof bits);
  }
  return scales;
}

// Every weight times its scale is a bfloat16: there is nothing to round.
inline uint16_t widen_nibble(int nibble, float scale) {
  const int weight = (nibble & 8) != 0 ? -(nibble & 7) : nibble & 7;
  const float value = static_cast<float>(weight) * scale;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

inline void widen_one_line(const uint8_t* line, const PlainInt4Scales& scales, char* to,
                           int64_t stride_bytes) {
  for (int pair = 0; pair < 4; ++pair) {
    uint16_t row[2 * kPanel];
    for (int i = 0; i < 2 * kPanel; ++i) {
      const int byte = line[i / 8 * 16 + pair % 2 * 8 + i % 8];
      row[i] = widen_nibble(byte >> (pair / 2 * 4) & 0xf, scales.of[i / 2]);
    }
    std::memcpy(to + pair * stride_bytes, row, sizeof row);
  }
}

}  // namespace

PlainInt4Scales plain_int4_scales(const uint8_t* bytes) { return scales_of(bytes); }

void widen_int4_line(const uint8_t* line, const PlainInt4Scales& scales, char* to,
                     int64_t stride_bytes) {
  widen_one_line(line, scales, to, stride_bytes);
}

REMORA_CLONES
void widen_int4(const PanelCall& call, char* to) {
  const int64_t stride = call.num_panels * kLineBytes;  // of a step, narrow, and of a pair, widened
  const uint8_t* from = static_cast<const uint8_t*>(call.weights);
  for (int64_t first = 0; first < call.num_steps; first += kInt4BlockSteps) {
    const uint8_t* bytes = from;
    from += kLineBytes;
    const int64_t count = std::min(kInt4BlockSteps, call.num_steps - first);
    for (int panel = 0; panel < call.num_panels; ++panel) {
      const PlainInt4Scales scales = scales_of(bytes + panel * kPanel);
      for (int64_t step = 0; step < count; ++step) {
        widen_one_line(from + step * stride + panel * kLineBytes, scales,
                       to + ((first + step) * 4 * call.num_panels + panel) * kLineBytes, stride);
      }
    }
    from += count * stride;
  }
}

void panel_widened(const PanelCall& call, WidenInt4 widen, PanelKernel bfloat16) {
  static thread_local Buffer wide;
  char* to = wide.take(call.num_steps * 4 * call.num_panels * kLineBytes);
  if (to == nullptr) throw std::bad_alloc();
  widen(call, to);
  PanelCall plain = call;
  plain.weights = to;
  plain.num_steps = 4 * call.num_steps;
  plain.weight_bytes = plain.num_steps * call.num_panels * kLineBytes;
  plain.next = nullptr;
  bfloat16(plain);
}

}  // namespace remora
