#include "ops/loss_options.h"

#include <c10/util/Exception.h>

namespace fastnn {
namespace {
constexpr std::string_view kReductions[] = {"none", "mean", "sum"};
static_assert(at::Reduction::None == 0 && at::Reduction::Mean == 1 && at::Reduction::Sum == 2);
}  // namespace

at::Reduction::Reduction parse_reduction(std::string_view name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kReductions[i]) return at::Reduction::Reduction(i);
  }
  TORCH_CHECK_VALUE(false, name,
                    " is not a valid value for reduction: expected 'none', 'mean' or 'sum'");
}

std::string_view reduction_name(at::Reduction::Reduction reduction) {
  return kReductions[reduction];
}

}  // namespace fastnn
