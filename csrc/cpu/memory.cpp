#include "cpu/memory.h"

#include <ATen/EmptyTensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastnn::cpu {
namespace {

#if defined(__linux__)
// Asks for huge pages where the memory is not yet backed by any. Advice: the kernel may refuse it.
void advise_huge_pages(void* data, size_t bytes) {
  constexpr size_t kPage = 4096;
  constexpr size_t kWorthACall = 4 << 20;
  if (bytes < kWorthACall) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
#else
void advise_huge_pages(void*, size_t) {
}
#endif

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  const at::Tensor result = at::detail::empty_cpu(sizes, dtype);
  advise_huge_pages(result.mutable_data_ptr(), result.nbytes());
  return result;
}

}  // namespace fastnn::cpu
