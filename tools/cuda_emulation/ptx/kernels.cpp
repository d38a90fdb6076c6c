#include "ptx/kernels.h"

#include <dlfcn.h>

#include <map>
#include <string>

#include "cuda_emulation/runtime.h"

namespace fastnn::cuda_emulation::ptx {
namespace {

std::map<std::string, TranslatedKernel>& kernels() {
  static std::map<std::string, TranslatedKernel> result;
  return result;
}

std::string symbol_at(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_sname == nullptr) {
    throw Fault("a launched kernel has no name");
  }
  return info.dli_sname;
}

}  // namespace

Registration::Registration(const char* name, Body body, std::vector<size_t> parameter_bytes,
                           size_t max_threads) {
  // A template that two modules instantiate is kept once: the copies are the same.
  kernels().emplace(name, TranslatedKernel{body, std::move(parameter_bytes), max_threads});
}

const TranslatedKernel& find(const void* kernel, std::span<const Parameter> parameters,
                             size_t threads) {
  const std::string name = symbol_at(kernel);
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw Fault("the PTX has no kernel " + name);
  TranslatedKernel& translated = found->second;
  bool same = parameters.size() == translated.parameter_bytes.size();
  for (size_t i = 0; same && i < parameters.size(); ++i) {
    same = parameters[i].bytes == translated.parameter_bytes[i];
  }
  if (!same) throw Fault("the two compilers differ in the parameters of " + name);
  if (threads > translated.max_threads) {
    throw Fault("invalid launch: " + std::to_string(threads) + " threads are more than " + name +
                " is compiled for");
  }
  translated.launched = true;
  return translated;
}

std::vector<std::string> never_launched() {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : kernels()) {
    if (!kernel.launched) names.push_back(name);
  }
  return names;
}

size_t kernel_count() {
  return kernels().size();
}

}  // namespace fastnn::cuda_emulation::ptx
