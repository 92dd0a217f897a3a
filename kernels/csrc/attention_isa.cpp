// The arithmetic of paged attention, compiled once per instruction set.
#include "attention.h"

#include <algorithm>
#include <cmath>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace remora_attention {

#define REMORA_ISA 0
namespace portable {
#include "attention_kernel.h"
#include "attention_tiles.h"
}
#undef REMORA_ISA

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define REMORA_ISA 1
namespace avx2 {
#include "attention_kernel.h"
}
#undef REMORA_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define REMORA_ISA 2
namespace avx512 {
#include "attention_kernel.h"
#include "attention_blocks.h"
}
#undef REMORA_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define REMORA_ISA 3
namespace avx512bf16 {
#include "attention_kernel.h"
#include "attention_blocks.h"
#include "attention_tiles.h"
}
#undef REMORA_ISA
#pragma GCC pop_options
#endif

namespace {

template <class Word>
Kernel choose(int level) {
#if defined(__x86_64__)
  if (level == 3) {
    using namespace avx512bf16;
    return {ROWS_MAX, run_keys<Word>, nullptr, merge_states, finish_rows<Word>, write_block<Word>};
  }
  if (level == 2) {
    using namespace avx512;
    return {ROWS_MAX, run_keys<Word>, nullptr, merge_states, finish_rows<Word>, write_block<Word>};
  }
  if (level == 1) {
    using namespace avx2;
    return {ROWS_MAX, run_keys<Word>, nullptr, merge_states, finish_rows<Word>, nullptr};
  }
#endif
  using namespace portable;
  return {ROWS_MAX, run_keys<Word>, nullptr, merge_states, finish_rows<Word>, nullptr};
}

}  // namespace

Kernel choose_kernel(bool bfloat16, int level) {
  if (level == kEmulatedTiles && bfloat16) {
    Kernel kernel = choose<WordBF16>(0);
    kernel.run_tiled = portable::run_tiled;
    return kernel;
  }
  Kernel kernel = bfloat16 ? choose<WordBF16>(std::min(level, 3)) : choose<WordF32>(std::min(level, 3));
#if defined(__x86_64__)
  if (level == 4 && bfloat16) kernel.run_tiled = avx512bf16::run_tiled;
#endif
  return kernel;
}

}  // namespace remora_attention
