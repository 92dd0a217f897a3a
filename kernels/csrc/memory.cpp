// stream_read: what memory gives, the measure that benchmarks hold kernels against.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "scalar.h"
#include "team.h"

namespace remora {
namespace {

constexpr int64_t kReadBlock = 1 << 20;  // bytes of one task

// The sum of all words, so that every one must be read.
REMORA_CLONES uint64_t add_words(const uint64_t* words, int64_t count) {
  uint64_t sums[64] = {};
  const int64_t whole = count / 64 * 64;
  for (int64_t i = 0; i < whole; i += 64) {
    for (int64_t j = 0; j < 64; ++j) sums[j] += words[i + j];
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  for (int64_t i = whole; i < count; ++i) total += words[i];
  return total;
}

// Reads a tensor's memory with all threads of the team and gives the sum of its 8-byte words.
int64_t stream_read(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "tensor must be contiguous");
  const char* bytes = static_cast<const char*>(tensor.const_data_ptr());
  std::atomic<uint64_t> total{0};
  team_for(tensor.nbytes() / 8 * 8, kReadBlock, [&](int64_t begin, int64_t end) {
    total += add_words(reinterpret_cast<const uint64_t*>(bytes + begin), (end - begin) / 8);
  });
  return static_cast<int64_t>(total.load());
}

}  // namespace
}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  m.def("stream_read(Tensor tensor) -> int");
}

TORCH_LIBRARY_IMPL(remora, CPU, m) {
  m.impl("stream_read", &remora::stream_read);
}
