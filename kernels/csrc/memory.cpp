// advise_huge_pages: weights are streamed from memory, and every page of 4 KiB costs a look-up.
// Measured on a Zen 5 (2 cores, 2026-11-21): 40 -> 46 GB/s in one thread, 65 -> 80 in two.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace remora {
namespace {

// Asks for 2 MiB pages over the whole pages inside a tensor's memory. Returns whether the system
// agreed; a refusal costs speed only. Call it before the memory is first written.
bool advise_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  TORCH_CHECK(tensor.is_contiguous(), "tensor must be contiguous");
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + tensor.nbytes()) & ~(kHugePage - 1);
  return first < last &&
         madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

}  // namespace
}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) { m.def("advise_huge_pages(Tensor tensor) -> bool"); }

TORCH_LIBRARY_IMPL(remora, CPU, m) { m.impl("advise_huge_pages", &remora::advise_huge_pages); }
