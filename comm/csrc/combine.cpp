// Combine: the one place of this extension that computes. Built with -ffp-contract=off, so every
// clone below rounds each product and each sum on its own, as numba's code does.
#include <bit>
#include <cstring>

#include "plan.h"

#if defined(__x86_64__) && defined(__linux__)
#define REMORA_CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define REMORA_CLONES
#endif

namespace remora {
namespace {

struct Term {
  const char* row;
  float weight;
};

constexpr int64_t kBlock = 64;  // elements summed in registers

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const uint32_t nan = bits >> 16 | 0x40;  // NaN stays NaN
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}

inline void add_bfloat16(float* sum, const char* row, float weight, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, row + 2 * i, 2);
    sum[i] += weight * std::bit_cast<float>(uint32_t{bits} << 16);
  }
}

inline void add_float32(float* sum, const char* row, float weight, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float value;
    std::memcpy(&value, row + 4 * i, 4);
    sum[i] += weight * value;
  }
}

REMORA_CLONES void sum_bfloat16(const Term* terms, int num_terms, int64_t width, char* out) {
  for (int64_t d = 0; d < width; d += kBlock) {
    float sum[kBlock] = {};
    uint16_t rounded[kBlock];
    const int64_t count = width - d < kBlock ? width - d : kBlock;
    for (int i = 0; i < num_terms; ++i) {
      if (count == kBlock)  // a fixed trip count is what the compiler vectorises well
        add_bfloat16(sum, terms[i].row + 2 * d, terms[i].weight, kBlock);
      else
        add_bfloat16(sum, terms[i].row + 2 * d, terms[i].weight, count);
    }
    for (int64_t i = 0; i < kBlock; ++i) rounded[i] = to_bfloat16(sum[i]);
    std::memcpy(out + 2 * d, rounded, 2 * count);
  }
}

REMORA_CLONES void sum_float32(const Term* terms, int num_terms, int64_t width, char* out) {
  for (int64_t d = 0; d < width; d += kBlock) {
    float sum[kBlock] = {};
    const int64_t count = width - d < kBlock ? width - d : kBlock;
    for (int i = 0; i < num_terms; ++i) {
      if (count == kBlock)
        add_float32(sum, terms[i].row + 4 * d, terms[i].weight, kBlock);
      else
        add_float32(sum, terms[i].row + 4 * d, terms[i].weight, count);
    }
    std::memcpy(out + 4 * d, sum, 4 * count);
  }
}

}  // namespace

void combine(const Layout& layout, const Routing& routing, int64_t width, bool is_bfloat16,
             bool presummed, const std::vector<const char*>& reply_C, char* out,
             int64_t out_rows) {
  const int64_t row_bytes = width * (is_bfloat16 ? 2 : 4);
  const int64_t top_k = routing.top_k;
  for (int64_t t = 0; t < routing.num_tokens; ++t) {
    Term terms[kTopKMax];
    int num_terms = 0;
    const int32_t* call_K = layout.call_TK.data() + t * top_k;
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t c = call_K[k];
      if (c < 0) continue;
      if (!presummed) {
        const int64_t pos = layout.pos_TK[t * top_k + k];
        terms[num_terms++] = {reply_C[c] + pos * row_bytes, routing.weight_TK[t * top_k + k]};
        continue;
      }
      bool seen = false;
      for (int64_t j = 0; j < k; ++j) seen |= call_K[j] == c;
      if (seen) continue;
      const int64_t row = layout.row_TK[t * top_k + k];
      terms[num_terms++] = {reply_C[c] + row * row_bytes, 1.0f};
    }
    (is_bfloat16 ? sum_bfloat16 : sum_float32)(terms, num_terms, width, out + t * row_bytes);
  }
  if (out_rows > routing.num_tokens)
    std::memset(out + routing.num_tokens * row_bytes, 0,
                (out_rows - routing.num_tokens) * row_bytes);
}

}  // namespace remora
