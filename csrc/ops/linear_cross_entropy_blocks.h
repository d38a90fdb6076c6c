// linear_cross_entropy block by block: a few rows of logits at a time, their losses, their
// gradient, and its two products. The logits are in the accumulation dtype. The same for every
// device, whose part is `Device`:
//   kAdjustsLogits            whether `losses` and `gradient` scale and cap the products themselves
//   kLeavesOutIgnored         whether counting_rows says which rows count; a device that would have
//                             to be synchronized multiplies the others as zeros
//   dtype(input)              of the products' operands, gradients included, but not the weight
//   rows(n, classes, features)    how many rows a block has
//   counting_rows(target, classes, ignore_index)    the indices of the rows that aren't ignored;
//                             undefined if all count
//   total_weight(target, options, classes)    of the rows that count, in float64 and 0-d
//   product(out, a, b, bias, add)    out = a @ b (+ bias), or out + a @ b
//   add_column_sums(sums, block)
//   losses(block, options)    each row's loss and log-sum-exp; the gradient if it is wanted, which
//                             may replace the logits
//   gradient(block, options)  the gradient from the log-sum-exps
//   sum(losses)               of the rows, in float64 and 0-d
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "ops/linear_cross_entropy.h"

namespace fastnn {

// Some rows of the logits, and their results.
struct LogitRows {
  at::Tensor logits;   // before they are scaled and capped, if the device does that
  at::Tensor target;   // class indices, or class probabilities in the logits' dtype
  at::Tensor losses;   // a number for each row, in the accumulation dtype
  at::Tensor max;      // likewise; undefined where no log-sum-exp is wanted
  at::Tensor log_sum;  // likewise, or its exponential: what the device's kernels keep
  at::Tensor grad;     // what multiplies the gradient, a number or one for each row; undefined
                       // where no gradient is wanted
  at::ScalarType gradient_dtype;
};

template <typename Device>
class LinearCrossEntropyBlocks {
 public:
  LinearCrossEntropyBlocks(const LinearHead& head, const at::Tensor& target,
                           const LinearLossOptions& options, HeadMask wanted)
      : options_(options),
        wanted_(wanted),
        rows_(head.input.dim() == 1 ? head.input.unsqueeze(0) : head.input),
        weight_(head.weight),
        sums_dtype_(accumulate_dtype(head.input)),
        dtype_(Device::dtype(head.input)) {
    if (head.bias) bias_ = head.bias->to(sums_dtype_).contiguous();
    if (options_.weight) options_.weight = options_.weight->to(sums_dtype_).contiguous();
    const at::Tensor logits = shape_of_logits(head, options);
    probabilities_ = has_class_probabilities(logits, target);
    per_row_sizes_ = per_row_sizes(logits);
    loss_dtype_ = logits.scalar_type();
    if (probabilities_) {
      target_ = target.reshape({rows_.size(0), classes()});
    } else {
      target_ = contiguous_indices(target).reshape({rows_.size(0)});
      if constexpr (Device::kLeavesOutIgnored) {
        counting_ = Device::counting_rows(target_, classes(), options_.ignore_index);
        if (counting_.defined()) target_ = target_.index_select(0, counting_);
      } else {
        ignored_ = target_ == options_.ignore_index;
      }
    }
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward() {
    if (options_.per_row()) wanted_ = {};  // the backward computes the gradients
    const at::Tensor losses = numbers({rows()});
    const at::Tensor total = divisor();
    at::Tensor grad;
    if (wants_gradients()) grad = multiplier(total.reciprocal().to(sums_dtype_));
    const at::Tensor lse = options_.per_row() ? numbers({2, rows()}) : at::Tensor();
    make_gradients();
    for_each_block([&](LogitRows& block, int64_t begin, int64_t n) {
      block.losses = losses.narrow(0, begin, n);
      if (lse.defined()) {
        block.max = lse[0].narrow(0, begin, n);
        block.log_sum = lse[1].narrow(0, begin, n);
      }
      block.grad = grad;
      return Device::losses(block, options_);
    });
    if (options_.per_row()) {
      return {expanded(losses).reshape(per_row_sizes_).to(loss_dtype_), at::Tensor(), at::Tensor(),
              at::Tensor(), expanded_lse(lse)};
    }
    const at::Tensor loss = (Device::sum(losses) / total).to(loss_dtype_);
    auto [grad_input, grad_weight, grad_bias] = gradients();
    return {loss, grad_input, grad_weight, grad_bias, at::Tensor()};
  }

  HeadGradients backward(const at::Tensor& grad_output, const at::Tensor& lse) {
    const at::Tensor grad =
        multiplier(compact(grad_output.reshape({rows_.size(0)}).to(sums_dtype_), 0));
    const at::Tensor parts = compact(lse.reshape({2, rows_.size(0)}), 1);
    make_gradients();
    for_each_block([&](LogitRows& block, int64_t begin, int64_t n) {
      block.max = parts[0].narrow(0, begin, n);
      block.log_sum = parts[1].narrow(0, begin, n);
      block.grad = grad.narrow(0, begin, n);
      return Device::gradient(block, options_);
    });
    const auto rounded = [&](const at::Tensor& sum) {
      return sum.defined() ? sum.to(rows_.scalar_type()) : sum;
    };
    const auto [grad_input, grad_weight, grad_bias] = gradients();
    return {rounded(grad_input), rounded(grad_weight), rounded(grad_bias)};
  }

 private:
  int64_t rows() const {
    return counting_.defined() ? counting_.size(0) : rows_.size(0);
  }
  int64_t classes() const {
    return weight_.size(0);
  }
  int64_t features() const {
    return weight_.size(1);
  }
  bool wants_gradients() const {
    return wanted_[0] || wanted_[1] || wanted_[2];
  }
  at::Tensor numbers(at::IntArrayRef sizes) const {
    return at::empty(sizes, rows_.options().dtype(sums_dtype_));
  }

  // The divisor of the sum of the losses, in float64; NaN for a mean over nothing.
  at::Tensor divisor() const {
    const auto options = rows_.options().dtype(at::kDouble);
    if (options_.normalizer) return options_.normalizer->to(at::kDouble);
    if (!options_.is_mean()) return at::ones({}, options);
    if (probabilities_) return at::full({}, target_.numel() == 0 ? NAN : double(rows()), options);
    const at::Tensor total = Device::total_weight(target_, options_, classes());
    return total.masked_fill(total == 0, NAN);
  }

  // The factors of the rows' gradients, from that of the losses. float16 lacks the range for a mean
  // over many rows: there the largest factor in magnitude multiplies the sums instead.
  at::Tensor multiplier(const at::Tensor& grad) {
    at::Tensor multiplier = grad;
    if (options_.logit_scale != 1) multiplier = multiplier * options_.logit_scale;
    if (dtype_ != at::kHalf || multiplier.numel() == 0) return multiplier;
    at::Tensor sizes = multiplier.abs();
    if (ignored_.defined() && sizes.dim() == 1) sizes = sizes.masked_fill(ignored_, 0);
    const at::Tensor largest = sizes.amax();
    // If it is infinite or NaN, it must reach only the gradients of its own rows.
    factor_ = at::where((largest > 0).logical_and(largest < INFINITY), largest, 1);
    return multiplier / factor_;
  }

  // Expand numbers of the rows that count to all rows, with 0 for the others; and back.
  at::Tensor expanded(const at::Tensor& compact) const {
    if (!counting_.defined()) return compact;
    return at::zeros({rows_.size(0)}, compact.options()).index_copy_(0, counting_, compact);
  }
  at::Tensor expanded_lse(const at::Tensor& lse) const {
    at::DimVector sizes = per_row_sizes_;
    sizes.insert(sizes.begin(), 2);
    if (!counting_.defined()) return lse.reshape(sizes);
    return at::zeros({2, rows_.size(0)}, lse.options())
        .index_copy_(1, counting_, lse)
        .reshape(sizes);
  }
  at::Tensor compact(const at::Tensor& per_row, int64_t dim) const {
    return counting_.defined() ? per_row.index_select(dim, counting_) : per_row.contiguous();
  }

  void make_gradients() {
    const bool some_ignored = counting_.defined() || rows() == 0;
    if (wanted_[0]) {
      grad_input_ = numbers({rows_.size(0), features()});
      if (some_ignored) grad_input_.zero_();
    }
    if (wanted_[1]) grad_weight_ = numbers(weight_.sizes());
    if (wanted_[1] && rows() == 0) grad_weight_.zero_();
    if (wanted_[2]) grad_bias_ = at::zeros({classes()}, rows_.options().dtype(at::kDouble));
  }
  HeadGradients gradients() const {
    if (factor_.defined()) {
      for (const at::Tensor& sums : {grad_input_, grad_weight_, grad_bias_}) {
        if (sums.defined()) sums.mul_(factor_);
      }
    }
    const at::Tensor grad_input =
        grad_input_.defined() && per_row_sizes_.empty() ? grad_input_.squeeze(0) : grad_input_;
    return {grad_input, grad_weight_, wanted_[2] ? grad_bias_.to(sums_dtype_) : at::Tensor()};
  }

  // Calls gradient = make(block, begin, n) with the logits of rows [begin, begin + n), and adds
  // the gradient's products if they are wanted.
  template <typename F>
  void for_each_block(F make) {
    if (rows() == 0) return;
    const int64_t most = std::min(rows(), Device::rows(rows(), classes(), features()));
    const at::Tensor logits = numbers({most, classes()});
    for (int64_t begin = 0; begin < rows(); begin += most) {
      const int64_t n = std::min(most, rows() - begin);
      const at::Tensor numbers = counting_.defined() ? counting_.narrow(0, begin, n) : at::Tensor();
      const at::Tensor input = numbers.defined() ? rows_.index_select(0, numbers).to(dtype_)
                                                 : rows_.narrow(0, begin, n).to(dtype_);
      LogitRows block;
      block.logits = logits.narrow(0, 0, n);
      block.target = target_.narrow(0, begin, n);
      if (probabilities_) block.target = block.target.to(sums_dtype_).contiguous();
      block.gradient_dtype = dtype_;
      Device::product(block.logits, input, weight_.t(), bias_, /*add=*/false);
      at::Tensor slope;
      if constexpr (!Device::kAdjustsLogits) slope = adjust(block.logits);
      const at::Tensor gradient = make(block, begin, n);
      if (!wants_gradients()) continue;
      if (slope.defined()) gradient.mul_(slope);
      add_products(gradient, input, begin, numbers);
    }
  }

  // Scales and caps the logits, and returns the derivative of the cap, if there is one.
  at::Tensor adjust(const at::Tensor& logits) const {
    if (options_.logit_scale != 1) logits.mul_(options_.logit_scale);
    if (options_.softcap == 0) return {};
    logits.div_(options_.softcap).tanh_();
    const at::Tensor slope = wants_gradients() ? 1 - logits.square() : at::Tensor();
    logits.mul_(options_.softcap);
    return slope;
  }

  void add_products(const at::Tensor& gradient, const at::Tensor& input, int64_t begin,
                    const at::Tensor& numbers_of_rows) {
    const int64_t n = gradient.size(0);
    if (wanted_[0]) {
      const at::Tensor to =
          numbers_of_rows.defined() ? numbers({n, features()}) : grad_input_.narrow(0, begin, n);
      Device::product(to, gradient, weight_, std::nullopt, /*add=*/false);
      if (numbers_of_rows.defined()) grad_input_.index_copy_(0, numbers_of_rows, to);
    }
    if (wanted_[1]) {
      // The gradient of an ignored row is 0, but its input may be NaN.
      const at::Tensor factors =
          ignored_.defined()
              ? at::where(ignored_.narrow(0, begin, n).unsqueeze(1), at::Scalar(0), input)
              : input;
      Device::product(grad_weight_, gradient.t(), factors, std::nullopt, /*add=*/begin != 0);
    }
    if (wanted_[2]) Device::add_column_sums(grad_bias_, gradient);
  }

  LinearLossOptions options_;
  HeadMask wanted_;
  at::Tensor rows_;
  at::Tensor weight_;
  std::optional<at::Tensor> bias_;
  at::Tensor target_;    // of the rows that count
  at::Tensor counting_;  // their indices; undefined if all count
  at::Tensor ignored_;   // whether a row is, where all are multiplied; undefined with probabilities
  at::Tensor factor_;    // what multiplies the sums of gradients; undefined where nothing does
  at::ScalarType sums_dtype_;
  at::ScalarType dtype_;
  at::ScalarType loss_dtype_;
  at::DimVector per_row_sizes_;
  bool probabilities_ = false;
  at::Tensor grad_input_, grad_weight_, grad_bias_;
};

}  // namespace fastnn
