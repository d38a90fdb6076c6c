// sgd_step_: one step of SGD with momentum over a list of tensors, in place.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(fastnn, m) {
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, "
      "float lr, float momentum=0, float dampening=0, float weight_decay=0, bool nesterov=False, "
      "bool maximize=False, bool is_first_step=False, Tensor? grad_scale=None, "
      "Tensor? found_inf=None) -> ()");
}
