#include "cpu/memory.h"

#include <ATen/EmptyTensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <memory>

#include "ops/integers.h"

namespace fastnn::cpu {
namespace {

#if defined(__linux__)
// Asks for huge pages for memory that has no pages yet. The system may ignore this advice.
void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kWorthACall = 4 << 20;
  if (bytes < kWorthACall) return;
  const auto begin = ceil_div(reinterpret_cast<uintptr_t>(data), kPage) * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Unmaps the memory of a large_zeros() tensor.
struct Mapping {
  void* data;
  size_t bytes;
  static void release(void* mapping) {
    const std::unique_ptr<Mapping> owned(static_cast<Mapping*>(mapping));
    munmap(owned->data, owned->bytes);
  }
};

// Null if the system is out of memory: torch's allocator then raises its own error.
at::DataPtr map_zeros(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return {};
  return {data, new Mapping{data, bytes}, Mapping::release, at::kCPU};
}
#else
void advise_huge_pages(void*, size_t) {
}
at::DataPtr map_zeros(size_t) {
  return {};
}
#endif

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType dtype) {
  const at::Tensor result = at::detail::empty_cpu(sizes, dtype);
  advise_huge_pages(result.mutable_data_ptr(), result.nbytes());
  return result;
}

std::optional<at::Tensor> large_zeros(at::IntArrayRef sizes, at::ScalarType dtype) {
  // malloc reuses smaller blocks; mapping those anew would be slower.
  constexpr size_t kMappedByMalloc = 64 << 20;
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (bytes < kMappedByMalloc) return std::nullopt;
  at::DataPtr data = map_zeros(bytes);
  if (!data) return std::nullopt;
  const auto type = c10::scalarTypeToTypeMeta(dtype);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data),
                       c10::GetAllocator(at::kCPU), /*resizable=*/true);
  at::Tensor result =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), at::DispatchKey::CPU, type);
  result.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return result;
}

}  // namespace fastnn::cpu
