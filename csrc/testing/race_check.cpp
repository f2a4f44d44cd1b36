// Runs the emulated kernels under ThreadSanitizer, which takes fibres for threads that only barriers order.
//
//   emulated_race_check CASE SCHEDULE REMOVED_BARRIER      exits with ThreadSanitizer's code (66) if it saw a race
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/select.h"

using namespace yopo;

namespace {

struct Case {
  const char* name;
  int channels, kernels, size, kernel, stride, padding;
  Activation activation;
  Norm norm;
  int steps;
  bool results;
  int shared_kilobytes;
  DType compute;
  bool mask_start;
};

constexpr Case kCases[] = {
    {"affine", 3, 16, 17, 3, 1, 1, Activation::kIdentity, Norm::kLinf, 2, true, 227, DType::kFloat32, false},
    {"output", 3, 16, 13, 3, 1, 1, Activation::kRelu, Norm::kLinf, 1, false, 227, DType::kFloat32, true},
    {"relu", 1, 16, 14, 3, 1, 0, Activation::kRelu, Norm::kLinf, 2, true, 227, DType::kFloat32, true},
    {"bands", 3, 16, 40, 7, 2, 3, Activation::kRelu, Norm::kLinf, 2, true, 80, DType::kFloat32, true},
    {"general", 2, 5, 6, 3, 1, 1, Activation::kGelu, Norm::kLinf, 2, true, 227, DType::kFloat64, true},
    {"general affine", 2, 5, 6, 3, 1, 1, Activation::kIdentity, Norm::kLinf, 2, true, 227, DType::kFloat32, true},
    {"general l2", 2, 5, 6, 3, 2, 1, Activation::kSilu, Norm::kL2, 2, true, 227, DType::kFloat32, true},
    {"general affine l2", 2, 5, 6, 3, 1, 1, Activation::kIdentity, Norm::kL2, 3, true, 227, DType::kFloat32, false},
};

struct Problem {
  Params p{};
  std::vector<std::vector<char>> memory;
  std::mt19937 random{7};
  double constants[4] = {0.02, 0.05, 0.0, 1.0};

  void* array(size_t count, double low, double high) {
    std::uniform_real_distribution<double> d(low, high);
    memory.emplace_back(count * 8);
    for (size_t i = 0; i < count; ++i) {
      if (p.compute == DType::kFloat64) {
        reinterpret_cast<double*>(memory.back().data())[i] = d(random);
      } else {
        reinterpret_cast<float*>(memory.back().data())[i] = float(d(random));
      }
    }
    return memory.back().data();
  }

  explicit Problem(const Case& c) {
    p.compute = p.costate_dtype = c.compute;
    const int out = (c.size + 2 * c.padding - c.kernel) / c.stride + 1,
              batch = c.size > 30 ? 2 : 3;  // more tiles than blocks
    p.batch = batch, p.channels = c.channels, p.height = p.width = c.size;
    p.kernels = c.kernels, p.out_height = p.out_width = out, p.rows = p.cols = c.kernel, p.groups = 1;
    for (int i = 0; i < 2; ++i) p.stride[i] = c.stride, p.padding[i] = c.padding, p.dilation[i] = 1;
    const size_t inputs = size_t(batch) * c.channels * c.size * c.size, outputs = size_t(batch) * c.kernels * out * out;
    const size_t weights = size_t(c.kernels) * c.channels * c.kernel * c.kernel;
    p.x = array(inputs, 0, 1), p.eta = array(inputs, -0.05, 0.05), p.costate = array(outputs, -1, 1);
    p.weight = array(weights, -1, 1), p.bias = array(size_t(c.kernels), -1, 1);
    p.eta_out = array(inputs, 0, 0), p.output = array(outputs, 0, 0);
    if (c.results) p.grad_weight = array(weights, 0, 0), p.grad_bias = array(size_t(c.kernels), 0, 0);
    const int64_t in[4] = {c.channels * c.size * c.size, c.size * c.size, c.size, 1};
    const int64_t on[4] = {int64_t(c.kernels) * out * out, int64_t(out) * out, out, 1};
    for (int i = 0; i < 4; ++i) {
      p.x_strides[i] = p.eta_strides[i] = p.eta_out_strides[i] = in[i];
      p.costate_strides[i] = p.output_strides[i] = on[i];
    }
    p.activation = c.activation, p.norm = c.norm, p.steps = c.steps, p.allow_tf32 = true, p.mask_start = c.mask_start;
    p.step_size = {&constants[0], 1}, p.eps = {&constants[1], 1}, p.lo = {&constants[2], 1}, p.hi = {&constants[3], 1};
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "usage: emulated_race_check CASE SCHEDULE REMOVED_BARRIER\n"), 2;
  for (const Case& c : kCases) {
    if (std::strcmp(argv[1], c.name) != 0) continue;
    emulation::set_schedule(emulation::Schedule(std::atoi(argv[2])), 3);
    emulation::remove_barrier(std::atoi(argv[3]));
    cuda::set_device_limits({c.shared_kilobytes * 1024, (c.shared_kilobytes + 1) * 1024, 1});
    Problem problem(c);
    std::vector<char> workspace(size_t(first_layer_update_cuda_workspace(problem.p)) + 256);
    void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
    std::printf("%s\n", cuda_variant(problem.p));
    try {
      return first_layer_update_cuda(problem.p, aligned, nullptr).ok() ? 0 : 3;
    } catch (const emulation::Failure& failure) {
      return std::fprintf(stderr, "%s\n", failure.what()), 4;
    }
  }
  return std::fprintf(stderr, "no case '%s'\n", argv[1]), 2;
}
