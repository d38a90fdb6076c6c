// The dtype that each operator runs in under torch.autocast: torch's own lists. linear is cast
// down, and so is linear_relu; the losses to float32, and on CUDA log_softmax too, which on the CPU
// keeps the dtype that it gets.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/cross_entropy.h"
#include "ops/linear.h"
#include "ops/log_softmax.h"
#include "ops/nll_loss.h"

namespace fastnn {
namespace {

using at::autocast::CastPolicy;

// Registers `function`, which calls the operator through the dispatcher again, below autocast.
template <CastPolicy policy, c10::DeviceType device, auto* function>
constexpr auto* kAutocast =
    &at::autocast::WrapFunction<policy, device, std::remove_pointer_t<decltype(function)>,
                                std::remove_pointer_t<decltype(function)>, function>::type::call;

template <c10::DeviceType device>
void register_common(torch::Library& m) {
  m.impl("linear", kAutocast<CastPolicy::lower_precision_fp, device, &linear>);
  m.impl("linear_relu", kAutocast<CastPolicy::lower_precision_fp, device, &linear_relu>);
  m.impl("nll_loss", kAutocast<CastPolicy::fp32, device, &as_nll_loss<nll_loss>>);
  m.impl("cross_entropy", kAutocast<CastPolicy::fp32, device, &as_cross_entropy<cross_entropy>>);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastnn, AutocastCPU, m) {
  register_common<c10::kCPU>(m);
}

TORCH_LIBRARY_IMPL(fastnn, AutocastCUDA, m) {
  register_common<c10::kCUDA>(m);
  m.impl("log_softmax", kAutocast<CastPolicy::fp32, c10::kCUDA, &log_softmax>);
}

}  // namespace fastnn
