// What the test-only extension has besides the product's own sources: see build.py.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "cpu/capability.h"
#include "cuda_emulation/runtime.h"
#include "python/mlp_step.h"

#if defined(FASTNN_EMULATION_PTX)
#include "ptx/allocator.h"
#include "ptx/kernels.h"
#endif

namespace fastnn::cpu {

// The CPU's kernels are not built in.
const char* capability() {
  return "cuda emulation";
}

}  // namespace fastnn::cpu

namespace fastnn::python {
void define_mlp_step(pybind11::module_& /*m*/) {
}
}  // namespace fastnn::python

namespace fastnn::cuda_emulation {
namespace {

void set_thread_order(std::string_view name, int64_t seed) {
  set_settings(
      {.order = parse_thread_order(std::string(name)), .seed = static_cast<unsigned>(seed)});
}

int64_t launches() {
  return statistics().launches;
}

// The library's products that are wider than their factors, which torch has for CUDA alone.
at::Tensor& wide_mm(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                    at::Tensor& out) {
  return at::mm_out(out, a.to(dtype), b.to(dtype));
}
at::Tensor& wide_addmm(const at::Tensor& addend, const at::Tensor& a, const at::Tensor& b,
                       at::ScalarType dtype, const at::Scalar& beta, const at::Scalar& alpha,
                       at::Tensor& out) {
  return at::addmm_out(out, addend, a.to(dtype), b.to(dtype), beta, alpha);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("mm.dtype_out", wide_mm);
  m.impl("addmm.dtype_out", wide_addmm);
}

TORCH_LIBRARY(fastnn_cuda_emulation, m) {
#if defined(FASTNN_EMULATION_PTX)
  ptx::watch_tensors();
  m.def("ptx_never_launched() -> str[]", ptx::never_launched);
  m.def("ptx_kernel_count() -> int", [] { return static_cast<int64_t>(ptx::kernel_count()); });
#endif
  m.def("set_thread_order(str name, int seed=1) -> ()", set_thread_order);
  m.def("launches() -> int", launches);
}

}  // namespace fastnn::cuda_emulation
