// The options of a step of SGD, for the kernels of all devices. No ATen.
#pragma once

namespace fastnn {

struct SGDOptions {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
  bool is_first_step;  // the momentum buffers hold nothing yet
};

}  // namespace fastnn
