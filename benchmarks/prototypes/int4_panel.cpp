// Does int4 pay? Panels of 16 columns by `vdpbf16ps` over weights of 16, 8 and 4 bits (issue 3, item 1).
//
//   g++ -O3 -march=native -std=c++20 benchmarks/prototypes/int4_panel.cpp -o /tmp/int4_panel && /tmp/int4_panel
//
// int4 has a scale (bfloat16) for every 64 inputs of a column. Each format is read once over far more
// memory than any cache holds, by one thread; every result is checked against plain arithmetic first.
// Prints: format, rows, ms a pass, GB/s of its own bytes, speed as a ratio to bfloat16.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int kInputs = 1024, kColumns = 16, kGroup = 64;
constexpr int kPairs = kInputs / 2, kGroups = kInputs / kGroup;

uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float widen(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// Bytes of one panel in each format.
constexpr size_t kBytes16 = size_t{kInputs} * kColumns * 2;
constexpr size_t kBytes8 = size_t{kInputs} * kColumns;
constexpr size_t kBytes4 = size_t{kInputs} * kColumns / 2 + size_t{kGroups} * kColumns * 2;

template <int kRows>
void panel16(const char* w, const uint16_t* x, float* out) {
  __m512 sum[kRows];
  for (auto& s : sum) s = _mm512_setzero_ps();
  for (int p = 0; p < kPairs; ++p) {
    _mm_prefetch(w + p * 64 + 8192, _MM_HINT_T0);
    const __m512bh v = (__m512bh)_mm512_loadu_si512(w + p * 64);
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * kInputs + 2 * p, 4);
      sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_set1_epi32(pair), v);
    }
  }
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out + r * 16, sum[r]);
}

template <int kRows>
void panel8(const char* w, const uint16_t* x, float* out) {  // as simd_int8.h, without a scale
  __m512 sum[kRows];
  for (auto& s : sum) s = _mm512_setzero_ps();
  for (int p = 0; p < kPairs; ++p) {
    if (p % 2 == 0) _mm_prefetch(w + p * 32 + 8192, _MM_HINT_T0);
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + p * 32)));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(wide, 16), 16));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_srai_epi32(wide, 16));
    const __m512i both = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                         _mm512_and_si512(_mm512_castps_si512(high),
                                                          _mm512_set1_epi32(int(0xffff0000))));
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * kInputs + 2 * p, 4);
      sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)both);
    }
  }
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out + r * 16, sum[r]);
}

// A line holds four pairs of k: the nibble j of a 16-bit lane is pair j of that lane's column and half.
template <int kRows>
void panel4(const char* w, const uint16_t* x, float* out) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) table[i] = narrow(float((i & 15) - 8));  // bit 4 of an index is noise
  const __m512i lut = _mm512_load_si512(table);
  const char* scales = w + size_t{kInputs} * kColumns / 2;
  __m512 sum[kRows];
  for (auto& s : sum) s = _mm512_setzero_ps();
  for (int g = 0; g < kGroups; ++g) {
    __m512 part[kRows];
    for (auto& s : part) s = _mm512_setzero_ps();
    for (int line = g * kGroup / 8; line < (g + 1) * kGroup / 8; ++line) {
      _mm_prefetch(w + line * 64 + 8192, _MM_HINT_T0);
      __m512i nibbles = _mm512_loadu_si512(w + line * 64);
      for (int j = 0; j < 4; ++j) {
        const __m512bh v = (__m512bh)_mm512_permutexvar_epi16(nibbles, lut);
        nibbles = _mm512_srli_epi16(nibbles, 4);
        for (int r = 0; r < kRows; ++r) {
          int32_t pair;
          std::memcpy(&pair, x + r * kInputs + 2 * (line * 4 + j), 4);
          part[r] = _mm512_dpbf16_ps(part[r], (__m512bh)_mm512_set1_epi32(pair), v);
        }
      }
    }
    const __m512i s16 = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(scales + g * 32)));
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(s16, 16));
    for (int r = 0; r < kRows; ++r) sum[r] = _mm512_fmadd_ps(part[r], scale, sum[r]);
  }
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out + r * 16, sum[r]);
}

using Panel = void (*)(const char*, const uint16_t*, float*);

// One panel of whole numbers -8..7 in each format; scales of int4 1, 2, 4, 1, ... by group.
void fill(int format, char* at, std::vector<float>& dense) {
  dense.resize(size_t{kInputs} * kColumns);
  std::memset(at, 0, format == 16 ? kBytes16 : format == 8 ? kBytes8 : kBytes4);
  uint64_t seed = 12345;
  for (int k = 0; k < kInputs; ++k) {
    for (int c = 0; c < kColumns; ++c) {
      seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      const int value = int(seed >> 60) - 8;
      const float scale = format == 4 ? float(1 << (k / kGroup % 3)) : 1.0f;
      dense[size_t(k) * kColumns + c] = value * scale;
      const int pair = k / 2, lane = c * 2 + k % 2;
      if (format == 16) {
        const uint16_t v = narrow(float(value));
        std::memcpy(at + pair * 64 + lane * 2, &v, 2);
      } else if (format == 8) {
        at[pair * 32 + lane] = char(value);
      } else {
        uint16_t v;
        std::memcpy(&v, at + pair / 4 * 64 + lane * 2, 2);
        v |= uint16_t(value + 8) << (4 * (pair % 4));
        std::memcpy(at + pair / 4 * 64 + lane * 2, &v, 2);
        const uint16_t s = narrow(scale);
        std::memcpy(at + size_t{kInputs} * kColumns / 2 + k / kGroup * 32 + c * 2, &s, 2);
      }
    }
  }
}

double measure(int format, int rows, Panel panel) {
  const size_t bytes = format == 16 ? kBytes16 : format == 8 ? kBytes8 : kBytes4;
  const size_t panels = (size_t{512} << 20) / kBytes16;  // the same weights in every format
  const size_t total = (panels * bytes + (2 << 20)) & ~size_t{(2 << 20) - 1};
  char* memory = static_cast<char*>(std::aligned_alloc(2 << 20, total));
  madvise(memory, total, MADV_HUGEPAGE);
  std::vector<float> dense, out(rows * 16), expected(rows * 16, 0.0f);
  std::vector<uint16_t> x(size_t(rows) * kInputs);
  for (size_t i = 0; i < x.size(); ++i) x[i] = narrow(float(int(i * 7 % 5) - 2));
  fill(format, memory, dense);
  for (size_t p = 1; p < panels; ++p) std::memcpy(memory + p * bytes, memory, bytes);
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < kInputs; ++k)
      for (int c = 0; c < 16; ++c)
        expected[r * 16 + c] += widen(x[r * kInputs + k]) * dense[size_t(k) * 16 + c];
  panel(memory, x.data(), out.data());
  if (out != expected) {
    std::printf("format %d, %d rows: wrong\n", format, rows);
    std::exit(1);
  }
  std::vector<double> times;
  for (int pass = 0; pass < 9; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    for (size_t p = 0; p < panels; ++p) panel(memory + p * bytes, x.data(), out.data());
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::free(memory);
  std::sort(times.begin(), times.end());
  std::printf("%6d %5d %9.2f (%.2f..%.2f) %8.1f\n", format, rows, times[4] * 1e3, times[0] * 1e3,
              times[8] * 1e3, panels * bytes / times[4] * 1e-9);
  return times[4];
}

}  // namespace

int main() {
  std::printf("format  rows   ms a pass (min..max)     GB/s\n");
  for (int round = 0; round < 3; ++round) {
    const double base1 = measure(16, 1, panel16<1>), int8_1 = measure(8, 1, panel8<1>);
    const double int4_1 = measure(4, 1, panel4<1>);
    const double base4 = measure(16, 4, panel16<4>), int8_4 = measure(8, 4, panel8<4>);
    const double int4_4 = measure(4, 4, panel4<4>);
    std::printf("ratio to bf16: rows 1: int8 %.2f, int4 %.2f; rows 4: int8 %.2f, int4 %.2f\n",
                base1 / int8_1, base1 / int4_1, base4 / int8_4, base4 / int4_4);
  }
}
