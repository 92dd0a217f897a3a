// Tiles of AMX in plain C++: the same sums in the same order as the instructions give, so that the
// tiling is tested on any machine. A product of two bfloat16 is exact in float32, so whether it is
// fused into its sum makes no difference. Denormals do: the instructions take them as zero.
#include "amx.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "buffer.h"
#include "int4.h"
#include "scalar.h"

#define REMORA_TARGET
#define REMORA_INLINE static inline

namespace remora::amx {
namespace {

struct EmulatedTiles {
  alignas(64) uint32_t words[8][16][16];
  int heights[8];

  // See amx_tiling.h.
  void configure(int rows, int second) {
    const int heights_one[8] = {rows, rows, rows, rows, rows, 16, 16, 16};
    const int heights_two[8] = {rows, rows, second, second, rows, second, 16, 16};
    std::copy_n(second == 0 ? heights_one : heights_two, 8, heights);
  }
  void end() {}
  template <int kTile>
  void zero() {
    std::memset(words[kTile], 0, sizeof words[kTile]);
  }
  template <int kTile>
  void load(const void* from, int64_t stride_bytes) {
    for (int row = 0; row < heights[kTile]; ++row) {
      std::memcpy(words[kTile][row], static_cast<const char*>(from) + row * stride_bytes, 64);
    }
  }
  template <int kTile>
  void store(float* to, int64_t stride_bytes) const {
    for (int row = 0; row < heights[kTile]; ++row) {
      std::memcpy(reinterpret_cast<char*>(to) + row * stride_bytes, words[kTile][row], 64);
    }
  }
  template <int kSum, int kRows, int kWeights>
  void multiply() {
    for (int row = 0; row < heights[kRows]; ++row) {
      float even[16] = {};
      float odd[16] = {};
      for (int pair = 0; pair < 16; ++pair) {
        const uint32_t x = words[kRows][row][pair];
        for (int column = 0; column < 16; ++column) {
          const uint32_t w = words[kWeights][pair][column];
          even[column] += widen(low(x)) * widen(low(w));
          odd[column] += widen(high(x)) * widen(high(w));
        }
      }
      float sums[16];
      std::memcpy(sums, words[kSum][row], sizeof sums);
      for (int column = 0; column < 16; ++column) sums[column] += even[column] + odd[column];
      std::memcpy(words[kSum][row], sums, sizeof sums);
    }
  }
  static uint16_t low(uint32_t pair) { return static_cast<uint16_t>(pair); }
  static uint16_t high(uint32_t pair) { return static_cast<uint16_t>(pair >> 16); }

  // Four k of sixteen columns, one byte each (panel.h), to two rows of a tile.
  static void widen_bytes(const uint8_t* from, char* to, int64_t stride_bytes) {
    for (int pair = 0; pair < 2; ++pair) {
      uint16_t row[32];
      for (int i = 0; i < 32; ++i) {
        const uint8_t byte = from[i / 8 * 16 + pair * 8 + i % 8];
        const float magnitude = static_cast<float>(byte & 0x7f);
        narrow(byte & 0x80 ? -magnitude : magnitude, row + i);
      }
      std::memcpy(to + pair * stride_bytes, row, sizeof row);
    }
  }
  static PlainInt4Scales int4_scales(const uint8_t* bytes) { return plain_int4_scales(bytes); }
  static void widen_nibbles(const uint8_t* from, const PlainInt4Scales& scales, char* to,
                            int64_t stride_bytes) {
    widen_int4_line(from, scales, to, stride_bytes);
  }
};

void finish_row(const float* sums, const float* scale, const uint16_t* bias, int count,
                uint16_t* out) {
  for (int i = 0; i < count; ++i) {
    float sum = sums[i];
    if (scale != nullptr) sum *= scale[i];
    if (bias != nullptr) sum += widen(bias[i]);
    narrow(sum, out + i);
  }
}

#include "amx_tiling.h"

#include "amx_narrow.h"

}  // namespace

void panel_emulated(const PanelCall& call) {
  panel_rows<EmulatedTiles, PlainWeights<false>>(call, call.num_steps * kPairBytes);
}
void panel_int8_emulated(const PanelCall& call) {
  panel_narrow<EmulatedTiles, Int8Form<EmulatedTiles>>(call);
}
void panel_int4_emulated(const PanelCall& call) {
  panel_narrow<EmulatedTiles, Int4Form<EmulatedTiles>>(call);
}

}  // namespace remora::amx
