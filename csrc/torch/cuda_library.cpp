// Layer 2. Registers the CUDA kernels of the operators (schemas: yopo_ext/kernels/ops.py).
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

void check_devices(const Arguments& arguments, int32_t device) {
  STD_TORCH_CHECK(arguments.all_on_cuda(device),
                  "yopo_ext::first_layer_update: every tensor must be on x's device, cuda:", device);
}

Results update(const Arguments& arguments, const Tensor& x, const Tensor& costate, const Tensor& weight) {
  const int32_t device = x.get_device_index();
  check_devices(arguments, device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  return cuda_update(arguments, x, costate, weight, current_stream(device));
}

std::string variant(const Arguments& arguments, const Tensor& x, const Tensor&, const Tensor&) {
  check_devices(arguments, x.get_device_index());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return cuda_variant_text(arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yopo_ext, CUDA, m) {
  m.impl("first_layer_update", TORCH_BOX((&with_arguments<Results, update>)));
  m.impl("first_layer_variant", TORCH_BOX((&with_arguments<std::string, variant>)));
}

}  // namespace yopo
