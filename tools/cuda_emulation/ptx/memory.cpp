#include "ptx/memory.h"

#include <cstdio>
#include <map>
#include <mutex>
#include <string>

#include "ptx/machine.h"

namespace fastnn::cuda_emulation::ptx {
namespace {

std::mutex mutex;
std::map<uint64_t, size_t>& tensors() {
  static auto* result = new std::map<uint64_t, size_t>();  // tensors may outlive static variables
  return *result;
}
// The tensor of the last access, as most are to the same few.
uint64_t last_start = 0;
size_t last_bytes = 0;

[[noreturn]] void fail_at(uint64_t address, size_t bytes, const std::string& what,
                          const Site& site) {
  char hexadecimal[20];
  std::snprintf(hexadecimal, sizeof(hexadecimal), "%#llx",
                static_cast<unsigned long long>(address));
  fail(std::to_string(bytes) + " bytes at " + hexadecimal + " " + what, site);
}

void check_alignment(uint64_t address, size_t bytes, const Site& site) {
  if (address % bytes != 0) fail_at(address, bytes, "are misaligned", site);
}

// An address outside tensors holds a variable's index and an offset into it.
size_t window(uint64_t address) {
  return address >> kWindowBits;
}
uint64_t offset(uint64_t address) {
  return address & ((uint64_t{1} << kWindowBits) - 1);
}

}  // namespace

void add_tensor(const void* start, size_t bytes) {
  const std::lock_guard lock(mutex);
  tensors()[reinterpret_cast<uint64_t>(start)] = bytes;
}

void remove_tensor(const void* start) {
  const std::lock_guard lock(mutex);
  tensors().erase(reinterpret_cast<uint64_t>(start));
  last_bytes = 0;
}

bool is_of_tensor(uint64_t address, size_t bytes) {
  const std::lock_guard lock(mutex);
  if (address < last_start || address - last_start >= last_bytes) {
    auto found = tensors().upper_bound(address);
    if (found == tensors().begin()) return false;
    --found;
    last_start = found->first;
    last_bytes = found->second;
  }
  return address - last_start < last_bytes && last_bytes - (address - last_start) >= bytes;
}

void* Memory::global(u64 address, size_t bytes, const Site& site) {
  check_alignment(address, bytes, site);
  if (!is_of_tensor(address, bytes)) fail_at(address, bytes, "belong to no tensor", site);
  return reinterpret_cast<void*>(address);
}

void* Memory::shared(u64 address, size_t bytes, const Site& site) const {
  check_alignment(address, bytes, site);
  if (window(address) == 0 || window(address) >= shared_.size()) {
    fail_at(address, bytes, "are not in shared memory", site);
  }
  const SharedVariable& variable = shared_[window(address)];
  const bool dynamic = variable.bytes == 0;
  const size_t size = dynamic ? dynamic_shared_bytes() : variable.bytes;
  if (offset(address) + bytes > size) {
    fail_at(address, bytes, std::string("are past the end of ") + variable.name, site);
  }
  void* start = dynamic ? dynamic_shared_memory() : shared_memory(&variable, size);
  return static_cast<char*>(start) + offset(address);
}

const void* Memory::parameter(u64 address, size_t bytes, const Site& site) const {
  check_alignment(address, bytes, site);
  const size_t i = window(address) - 1;
  if (i >= parameters_.size() || offset(address) + bytes > parameters_[i].bytes) {
    fail_at(address, bytes, "are not a parameter's", site);
  }
  return static_cast<const char*>(parameters_[i].data) + offset(address);
}

}  // namespace fastnn::cuda_emulation::ptx
