// Checks of arguments that several operators share. Each message names the operator, the argument,
// what it got and what is allowed.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "ops/loss_options.h"

namespace fastnn {

// float64, float32, bfloat16, float16: the dtypes the kernels are written for.
bool is_supported_dtype(at::ScalarType dtype);

// Whether there are kernels for such a tensor: for its dtype, its layout (nested tensors say that
// they are strided), and its device in this build. (Those of the meta device know shapes alone.) On
// other devices PyTorch's operators run.
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

// The shape of one value per row of a loss's input: its own without the class dimension.
at::DimVector per_row_sizes(const at::Tensor& input);

// Raises unless a loss's tensors are on one device.
void check_loss_devices(std::string_view op, const at::Tensor& input, const at::Tensor& target,
                        const std::optional<at::Tensor>& weight);

// The shape and dtype of the arguments of a loss over class indices.
void check_class_indices(std::string_view op, const at::Tensor& input, const at::Tensor& target,
                         const std::optional<at::Tensor>& weight);
void check_class_weight(std::string_view op, const at::Tensor& input,
                        const std::optional<at::Tensor>& weight);

// The checks of a loss's backward that its forward has not made: it may be called on its own.
void check_loss_backward(std::string_view op, const at::Tensor& grad_output,
                         const at::Tensor& input, const at::Tensor& total_weight,
                         const LossOptions& options);

// Class indices of torch's dtype: torch takes uint8 in some shapes only.
at::Tensor as_long(const at::Tensor& target);

// Raises for the class index `target`, which is out of range.
[[noreturn]] void raise_bad_target(int64_t target, int64_t classes, int64_t ignore_index);

}  // namespace fastnn
