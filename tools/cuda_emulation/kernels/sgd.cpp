#include "harness.h"

#include "cuda/sgd_kernels.cuh"

namespace fastnn::cuda::tests {
namespace {

// One parameter, with each of its tensors at an offset from a 16-byte boundary.
template <typename T, typename B>
struct Item {
  Buffer<T> param;
  Buffer<T> grad;
  Buffer<B> buffer;

  Item(int64_t n, int64_t param_offset, int64_t grad_offset, int64_t buffer_offset)
      : param(random_buffer<T>(n, param_offset)),
        grad(random_buffer<T>(n, grad_offset)),
        buffer(random_buffer<B>(n, buffer_offset)) {
  }
};

struct Case {
  SGDOptions options;
  // The scalars on the device; NaN if absent.
  double device_lr = NAN;
  double grad_scale = NAN;
  double found_inf = NAN;
  bool scalars_are_double = false;
};
// lr, momentum, dampening, weight_decay, nesterov, maximize, is_first_step
const Case kCases[] = {
    {.options = {0.1, 0, 0, 0, false, false, false}},
    {.options = {0.1, 0, 0, 0.01, false, true, false}, .grad_scale = 4},
    {.options = {0.1, 0.9, 0.3, 0, false, false, true}},
    {.options = {0.1, 0.9, 0.3, 0.01, false, false, false}, .grad_scale = 3, .found_inf = 0},
    {.options = {0.1, 0.9, 0, 0, true, true, false}, .grad_scale = 1},
    {.options = {0, 0.9, 0, 0, true, false, false}, .device_lr = 0.25},
    {.options = {0, 0, 0, 0, false, false, false},
     .device_lr = 0.25,
     .grad_scale = 3,
     .scalars_are_double = true},
    {.options = {0.1, 0.9, 0, 0, false, false, false}, .grad_scale = 2, .found_inf = 1},
    {.options = {0.1, 0.9, 0, 0, false, false, false},
     .found_inf = INFINITY,
     .scalars_are_double = true},
};

// A scalar in memory, as the kernel reads it on the device.
struct ScalarMemory {
  float as_float;
  double as_double;

  explicit ScalarMemory(double value) : as_float(float(value)), as_double(value) {
  }
  DeviceScalar get(bool is_double) const {
    if (std::isnan(as_double)) return {};
    return is_double ? DeviceScalar{&as_double, true} : DeviceScalar{&as_float, false};
  }
};

template <bool kMomentum, int kBytes, typename T, typename B>
void launch(std::vector<Item<T, B>>& items, const SGDArgs& args) {
  auto launcher = sgd_launcher<T, B, kMomentum, kBytes>(args, nullptr);
  for (Item<T, B>& item : items) {
    B* buffer = kMomentum ? item.buffer.data() : nullptr;
    launcher.add({item.param.data(), item.grad.data(), buffer}, item.param.size());
  }
  launcher.launch();
}

template <int kBytes, typename T, typename B>
void step(std::vector<Item<T, B>>& items, const Case& c) {
  const ScalarMemory lr(c.device_lr), scale(c.grad_scale), found(c.found_inf);
  const SGDArgs args{c.options, lr.get(c.scalars_are_double), scale.get(c.scalars_are_double),
                     found.get(c.scalars_are_double)};
  if (c.options.momentum != 0) {
    launch<true, kBytes>(items, args);
  } else if constexpr (std::is_same_v<T, B>) {  // the only kernel without momentum
    launch<false, kBytes>(items, args);
  }
}

template <typename T, typename B>
void check(const Item<T, B>& before, const Item<T, B>& after, const Case& c) {
  constexpr double kRoundings = 8;  // the most operations behind any result
  const SGDOptions& o = c.options;
  const double scale = std::isnan(c.grad_scale) ? 1 : c.grad_scale;
  const double lr = std::isnan(c.device_lr) ? o.lr : c.device_lr;
  const bool skipped = !std::isnan(c.found_inf) && c.found_inf != 0;
  for (int64_t i = 0; i < before.param.size(); ++i) {
    double x = before.param(i), g = before.grad(i), b = before.buffer(i);
    const double magnitude = std::abs(x) + std::abs(g) + std::abs(b);
    if (!skipped) {
      g /= scale;
      double d = (o.maximize ? -g : g) + o.weight_decay * x;
      if (o.momentum != 0) {
        b = o.is_first_step ? d : o.momentum * b + (1 - o.dampening) * d;
        d = o.nesterov ? d + o.momentum * b : b;
      }
      x -= lr * d;
    }
    expect_close("param", i, after.param[i], x, kRoundings, magnitude);
    expect_close("grad", i, after.grad[i], g, 1, magnitude);
    expect_close("momentum_buffer", i, after.buffer[i], b, kRoundings, magnitude);
  }
}

template <int kBytes = kArgumentBytes, typename T, typename B>
void run(std::vector<Item<T, B>>& items, const Case& c) {
  describe("%s buffer=%s tensors=%d case=%d", kName<T>, kName<B>, int(items.size()),
           int(&c - kCases));
  std::vector<Item<T, B>> before = items;
  if (c.options.is_first_step) {
    // On a first step the buffer is uninitialized.
    for (Item<T, B>& item : items) {
      for (int64_t i = 0; i < item.buffer.size(); ++i) item.buffer[i] = static_cast<B>(NAN);
    }
  }
  step<kBytes>(items, c);
  for (size_t i = 0; i < items.size(); ++i) check(before[i], items[i], c);
}

// As many tensors as a launch holds, and more. An empty tensor takes no place.
template <int kBytes, typename T, typename B>
void run_launches() {
  constexpr int full = TensorBatch<SGDPointers<T, B, true>, kBytes>::kCapacity;
  for (const auto& [count, launches] : {std::pair{full, 1}, {full + 1, 2}, {2 * full + 7, 3}}) {
    std::vector<Item<T, B>> items;
    for (int i = 0; i < count; ++i) items.emplace_back(1 + i % 4, 0, 0, 0);
    items.emplace_back(0, 0, 0, 0);
    const int64_t before = cuda_emulation::statistics().launches;
    run<kBytes>(items, kCases[3]);
    expect(cuda_emulation::statistics().launches == before + launches, "the launches of a step");
  }
}

template <typename T, typename B>
void run_cases() {
  constexpr int64_t w = kVecSize<T>, chunk = kSGDChunk<T>;
  for (const Case& c : kCases) {
    if (!std::is_same_v<T, B> && c.options.momentum == 0) continue;
    std::vector<Item<T, B>> items;
    for (const int64_t n : {int64_t{0}, int64_t{1}, w - 1, w, w + 1, 5 * w + 1, int64_t{97}}) {
      items.emplace_back(n, 0, 0, 0);
      items.emplace_back(n, 1, 1, 1);  // equally misaligned: vectors
      items.emplace_back(n, w - 1, w - 1, w - 1);
      items.emplace_back(n, w / 2, w / 2, w / 2);
      items.emplace_back(n, 0, 1, 0);  // differently misaligned: no vectors
      items.emplace_back(n, 1, 1, 0);
    }
    run(items, c);
  }
  // Sizes around a block's number of elements.
  for (const int64_t n : {chunk - 1, chunk, chunk + 1, 2 * chunk + 3}) {
    std::vector<Item<T, B>> items;
    items.emplace_back(n, 0, 0, 0);
    items.emplace_back(n, w - 1, w - 1, w - 1);
    items.emplace_back(n, 0, 1, 0);
    items.emplace_back(3, 0, 0, 0);
    run(items, kCases[3]);
  }
  run_launches<kArgumentBytes, T, B>();
  run_launches<kManyArgumentBytes, T, B>();
}

const Test test("sgd", [] {
  for_each_dtype([]<typename T>() {
    run_cases<T, T>();
    if (!std::is_same_v<T, accum<T>>) run_cases<T, accum<T>>();
  });
});

}  // namespace
}  // namespace fastnn::cuda::tests
