// bfloat16 panels on tiles of AMX: 16 rows x 32 k times 16 k pairs x 16 columns a step, which is how
// packed groups lie. The tiling is written against five tile operations with two implementations:
// the instructions, and plain C++ that does the same, so that the tiling is tested on any machine.
// A row's sums run over k in one order whatever the other rows are: every row count takes this way.
//
// REAL AMX HAS NOT RUN HERE (no such machine): `amx_works` compares both once before it is used.
#include "amx.h"

#include <algorithm>
#include <cstring>

#include "panel.h"
#include "scalar.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace remora::amx {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileSteps = 16;          // pairs of k: a tile row of 64 bytes
constexpr int kA = kGroupPanels;        // tiles 0..3 are sums, 4 rows, 5 weights
constexpr int kB = kGroupPanels + 1;

struct EmulatedTiles {
  alignas(64) uint32_t words[6][16][16];

  void begin() {}
  void end() {}
  template <int kTile>
  void zero() {
    std::memset(words[kTile], 0, sizeof words[kTile]);
  }
  template <int kTile>
  void load(const void* from, int64_t stride_bytes) {
    for (int row = 0; row < 16; ++row) {
      std::memcpy(words[kTile][row], static_cast<const char*>(from) + row * stride_bytes, 64);
    }
  }
  template <int kTile>
  void store(float* to, int64_t stride_bytes) const {
    for (int row = 0; row < 16; ++row) {
      std::memcpy(reinterpret_cast<char*>(to) + row * stride_bytes, words[kTile][row], 64);
    }
  }
  template <int kSum>
  void multiply() {
    for (int row = 0; row < 16; ++row) {
      float sums[16];
      std::memcpy(sums, words[kSum][row], sizeof sums);
      for (int pair = 0; pair < 16; ++pair) {
        const uint32_t x = words[kA][row][pair];
        for (int column = 0; column < 16; ++column) {
          const uint32_t w = words[kB][pair][column];
          sums[column] += widen(static_cast<uint16_t>(x)) * widen(static_cast<uint16_t>(w));
          sums[column] += widen(static_cast<uint16_t>(x >> 16)) * widen(static_cast<uint16_t>(w >> 16));
        }
      }
      std::memcpy(words[kSum][row], sums, sizeof sums);
    }
  }
};

template <class Tiles, int kPanel0, int kEnd, class Each>
inline void for_panels(Each&& each) {
  if constexpr (kPanel0 < kEnd) {
    each.template operator()<kPanel0>();
    for_panels<Tiles, kPanel0 + 1, kEnd>(each);
  }
}

// At most 16 rows from `row` on times all panels of the group.
template <class Tiles, int kPanels>
void block(const PanelCall& call, int64_t row, int count, Tiles& tiles) {
  alignas(64) uint16_t x[kTileRows][2 * kTileSteps] = {};
  alignas(64) uint32_t tail[kTileSteps][kPanel] = {};
  alignas(64) float sums[kTileRows][kGroup];
  const int64_t stride = kPanels * kPanel;  // 32-bit words of one step
  const uint32_t* weights = static_cast<const uint32_t*>(call.weights);
  for_panels<Tiles, 0, kPanels>([&]<int p>() { tiles.template zero<p>(); });
  for (int64_t step = 0; step < call.num_steps; step += kTileSteps) {
    const int64_t num_steps = std::min<int64_t>(kTileSteps, call.num_steps - step);
    if (num_steps < kTileSteps) std::memset(x, 0, sizeof x);
    for (int r = 0; r < count; ++r) {
      const uint16_t* from =
          call.x_rows != nullptr
              ? static_cast<const uint16_t*>(call.x_rows[row + r])
              : static_cast<const uint16_t*>(call.x) + (row + r) * call.x_stride;
      std::memcpy(x[r], from + 2 * step, 4 * num_steps);
    }
    tiles.template load<kA>(x, sizeof x[0]);
    for_panels<Tiles, 0, kPanels>([&]<int p>() {
      const uint32_t* from = weights + step * stride + p * kPanel;
      if (num_steps == kTileSteps) {
        tiles.template load<kB>(from, 4 * stride);
      } else {
        for (int64_t s = 0; s < num_steps; ++s) std::memcpy(tail[s], from + s * stride, 64);
        tiles.template load<kB>(tail, sizeof tail[0]);
      }
      tiles.template multiply<p>();
    });
  }
  for_panels<Tiles, 0, kPanels>([&]<int p>() {
    tiles.template store<p>(&sums[0][p * kPanel], sizeof sums[0]);
  });
  const uint16_t* bias = static_cast<const uint16_t*>(call.bias);
  for (int r = 0; r < count; ++r) {
    uint16_t* out = call.out_rows != nullptr
                        ? static_cast<uint16_t*>(call.out_rows[row + r]) + call.out_column
                        : static_cast<uint16_t*>(call.out) + (row + r) * call.out_stride;
    for (int column = 0; column < call.num_columns; ++column) {
      narrow(bias == nullptr ? sums[r][column] : sums[r][column] + widen(bias[column]),
             out + column);
    }
  }
}

template <class Tiles>
void panel_rows(const PanelCall& call) {
  Tiles tiles;
  tiles.begin();
  for (int64_t row = 0; row < call.num_rows; row += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, call.num_rows - row));
    switch (call.num_panels) {
      case 4:
        block<Tiles, 4>(call, row, count, tiles);
        break;
      case 3:
        block<Tiles, 3>(call, row, count, tiles);
        break;
      case 2:
        block<Tiles, 2>(call, row, count, tiles);
        break;
      default:
        block<Tiles, 1>(call, row, count, tiles);
        break;
    }
  }
  tiles.end();
}

#if defined(__x86_64__) && defined(__linux__)
#define REMORA_AMX __attribute__((target("amx-tile,amx-bf16")))

// gcc's intrinsics do not say that they read memory: what was written must be there before.
inline void memory_is_written() { asm volatile("" ::: "memory"); }

struct RealTiles {
  REMORA_AMX void begin() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
    } config;
    memory_is_written();
    _tile_loadconfig(&config);
  }
  REMORA_AMX void end() { _tile_release(); }
  // The intrinsics paste a tile's number into assembly: it must be a literal.
  template <int kTile>
  REMORA_AMX void zero() {
    if constexpr (kTile == 0) _tile_zero(0);
    if constexpr (kTile == 1) _tile_zero(1);
    if constexpr (kTile == 2) _tile_zero(2);
    if constexpr (kTile == 3) _tile_zero(3);
  }
  template <int kTile>
  REMORA_AMX void load(const void* from, int64_t stride_bytes) {
    memory_is_written();
    if constexpr (kTile == kA) _tile_loadd(4, from, stride_bytes);
    if constexpr (kTile == kB) _tile_loadd(5, from, stride_bytes);
  }
  template <int kTile>
  REMORA_AMX void store(float* to, int64_t stride_bytes) {
    if constexpr (kTile == 0) _tile_stored(0, to, stride_bytes);
    if constexpr (kTile == 1) _tile_stored(1, to, stride_bytes);
    if constexpr (kTile == 2) _tile_stored(2, to, stride_bytes);
    if constexpr (kTile == 3) _tile_stored(3, to, stride_bytes);
  }
  template <int kSum>
  REMORA_AMX void multiply() {
    if constexpr (kSum == 0) _tile_dpbf16ps(0, 4, 5);
    if constexpr (kSum == 1) _tile_dpbf16ps(1, 4, 5);
    if constexpr (kSum == 2) _tile_dpbf16ps(2, 4, 5);
    if constexpr (kSum == 3) _tile_dpbf16ps(3, 4, 5);
  }
};

// The system must be asked once before a process may use the tiles' state.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool has_tiles = (edx >> 24 & 1) != 0 && (edx >> 22 & 1) != 0;
  return has_tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

void panel_emulated(const PanelCall& call) { panel_rows<EmulatedTiles>(call); }

#if defined(__x86_64__) && defined(__linux__)
void panel_bfloat16(const PanelCall& call) { panel_rows<RealTiles>(call); }

bool amx_is_there() {
  static const bool answer = may_use_tiles();
  return answer;
}

bool amx_works() {
  constexpr int64_t kRows = 19, kSteps = 21, kColumns = 55;  // tails of all three
  static uint16_t x[kRows][2 * kSteps];
  static uint16_t weights[kSteps * kGroup * 2];
  uint16_t outs[2][kRows][kColumns] = {};
  // Small integers: every sum is exact, so both must agree to the last bit.
  for (int64_t i = 0; i < kRows * 2 * kSteps; ++i) narrow(float(i * 7 % 13 - 6), &x[0][0] + i);
  for (int64_t i = 0; i < kSteps * kGroup * 2; ++i) narrow(float(i * 5 % 17 - 8), weights + i);
  for (int real = 0; real < 2; ++real) {
    PanelCall call{};
    call.x = x;
    call.x_stride = 2 * kSteps;
    call.num_rows = kRows;
    call.weights = weights;
    call.num_steps = kSteps;
    call.num_panels = kGroupPanels;
    call.out = outs[real];
    call.out_stride = kColumns;
    call.num_columns = kColumns;
    (real != 0 ? panel_bfloat16 : panel_emulated)(call);
  }
  return std::memcmp(outs[0], outs[1], sizeof outs[0]) == 0;
}
#else
void panel_bfloat16(const PanelCall& call) { panel_emulated(call); }
bool amx_is_there() { return false; }
bool amx_works() { return false; }
#endif

}  // namespace remora::amx
