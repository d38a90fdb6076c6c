// Checks of arguments that several operators share. Each message names the operator, the argument,
// what it got and what is allowed.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "ops/loss_options.h"

namespace fastnn {

// Whether the kernels support this dtype: float64, float32, bfloat16 or float16.
bool is_supported_dtype(at::ScalarType dtype);

// Whether this build has kernels for the tensor's dtype, layout (nested tensors report strided) and
// device. Meta kernels only compute shapes. On other devices PyTorch's operators run.
bool has_kernels(const at::Tensor& tensor);

// Whether `other` is absent or on the device of `like`.
bool is_on_device_of(const at::Tensor& like, const std::optional<at::Tensor>& other);

// Raises unless `other` has the dtype and the device of `like`, the argument `like_name`.
void check_same_dtype(std::string_view op, const at::Tensor& like, std::string_view name,
                      const at::Tensor& other, std::string_view like_name = "input");
void check_same_device(std::string_view op, const at::Tensor& like, std::string_view name,
                       const at::Tensor& other, std::string_view like_name = "input");

// Raises unless `tensor` has exactly these sizes.
void check_sizes(std::string_view op, std::string_view name, const at::Tensor& tensor,
                 at::IntArrayRef expected);

// The dimension that holds the classes of a loss's input: 0 for (C), else 1.
inline int64_t class_dim(const at::Tensor& input) {
  return input.dim() == 1 ? 0 : 1;
}

// The shape of a value per row of a loss's input: the input's shape without the class dimension.
at::DimVector per_row_sizes(const at::Tensor& input);

// Raises unless a loss's tensors are on one device.
void check_loss_devices(std::string_view op, const at::Tensor& input, const at::Tensor& target,
                        const std::optional<at::Tensor>& weight);

// Whether kernels for such an input have a loss of the requested dtype: the input's, or the one it
// is summed in.
bool has_dtype_for(const at::Tensor& input, const LossOptions& options);
void check_dtype_of_loss(std::string_view op, const at::Tensor& input, const LossOptions& options);

// Raises unless a loss's class indices and class weights have the right device, shape and dtype.
void check_class_indices(std::string_view op, const at::Tensor& input, const at::Tensor& target,
                         const LossOptions& options);
void check_class_weight(std::string_view op, const at::Tensor& input, const LossOptions& options);

// Checks a loss's backward, which may be called without its forward.
void check_grad_dtype(std::string_view op, const at::Tensor& grad_output, const at::Tensor& input,
                      const LossOptions& options);
void check_loss_backward(std::string_view op, const at::Tensor& grad_output,
                         const at::Tensor& input, const at::Tensor& total_weight,
                         const LossOptions& options);

// Class indices as int64: torch accepts uint8 for some shapes only.
at::Tensor as_long(const at::Tensor& target);

// Raises the error for an out-of-range class index.
[[noreturn]] void raise_bad_target(int64_t target, int64_t classes, int64_t ignore_index);

}  // namespace fastnn
