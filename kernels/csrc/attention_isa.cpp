// The arithmetic of paged attention, compiled once per instruction set.
#include "attention.h"

#include <cmath>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace remora_attention {

#define REMORA_ISA 0
namespace portable {
#include "attention_kernel.h"
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
}
#undef REMORA_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define REMORA_ISA 3
namespace avx512bf16 {
#include "attention_kernel.h"
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
    return {ROWS_MAX, run_keys<Word>, merge_states, finish_rows<Word>};
  }
  if (level == 2) {
    using namespace avx512;
    return {ROWS_MAX, run_keys<Word>, merge_states, finish_rows<Word>};
  }
  if (level == 1) {
    using namespace avx2;
    return {ROWS_MAX, run_keys<Word>, merge_states, finish_rows<Word>};
  }
#endif
  using namespace portable;
  return {ROWS_MAX, run_keys<Word>, merge_states, finish_rows<Word>};
}

}  // namespace

Kernel choose_kernel(bool bfloat16, int level) {
  return bfloat16 ? choose<WordBF16>(level) : choose<WordF32>(level);
}

}  // namespace remora_attention
