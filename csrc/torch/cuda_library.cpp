// Layer 2. Registers the CUDA kernels of yopo_ext::first_layer_update.
//
// Nothing here waits for the device, and the only allocations are torch tensors, so a call can be captured in a graph.
#include <torch/csrc/stable/accelerator.h>

#include "torch/cuda_update.h"

// Exported by torch builds with CUDA; absent from others, into which this library must still load.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace yopo {

namespace {

CudaStream current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "yopo_ext: this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "yopo_ext: torch has no current CUDA stream");
  return stream;
}

}  // namespace

Results first_layer_update_cuda_op(const Tensor& x, const Tensor& eta, const Tensor& costate, const Tensor& weight,
                                   std::optional<Tensor> bias, std::optional<Tensor> scale, std::optional<Tensor> shift,
                                   std::vector<double> mean, std::vector<double> std, std::vector<int64_t> stride,
                                   std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                                   int64_t activation, double negative_slope, int64_t steps,
                                   std::vector<double> step_size, std::vector<double> eps, std::vector<double> lo,
                                   std::vector<double> hi, int64_t norm, bool need_output, bool need_weight_grad,
                                   bool allow_tf32) {
  const int32_t device = x.get_device_index();
  auto on_device = [device](const Tensor& t) { return t.is_cuda() && t.get_device_index() == device; };
  bool together = on_device(eta) && on_device(costate) && on_device(weight);
  for (const std::optional<Tensor>* t : {&bias, &scale, &shift})
    together = together && (!t->has_value() || on_device(**t));
  STD_TORCH_CHECK(together, "yopo_ext::first_layer_update: every tensor must be on x's device, cuda:", device);

  const torch::stable::accelerator::DeviceGuard guard(device);
  const Arguments arguments(x, eta, costate, weight, bias, scale, shift, std::move(mean), std::move(std), stride,
                            padding, dilation, groups, activation, negative_slope, steps, std::move(step_size),
                            std::move(eps), std::move(lo), std::move(hi), norm, need_output, need_weight_grad,
                            allow_tf32);
  return cuda_update(arguments, x, costate, weight, current_stream(device));
}

STABLE_TORCH_LIBRARY_IMPL(yopo_ext, CUDA, m) { m.impl("first_layer_update", TORCH_BOX(&first_layer_update_cuda_op)); }

}  // namespace yopo
