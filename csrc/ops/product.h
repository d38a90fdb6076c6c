// Which matrix product an operator uses, the library's or ours. An environment variable can force
// the choice, for tests and comparisons.
#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace fastnn {

enum class Product { Auto, Library, Tiled };

inline Product requested_product(const char* variable) {
  const char* value = std::getenv(variable);
  const std::string_view name = value == nullptr ? "" : value;
  if (name.empty() || name == "auto") return Product::Auto;
  if (name == "library") return Product::Library;
  if (name == "tiled") return Product::Tiled;
  TORCH_CHECK_VALUE(false, variable, " must be auto, library or tiled, not '", name, "'");
}

}  // namespace fastnn
