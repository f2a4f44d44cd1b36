// Layer 2. From checked arguments to launches on a stream. Tests run the same code on the emulated kernels.
#pragma once

#include <string>

#include "torch/patch_update.h"

namespace yopo {

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// What would run, in words; where it is the general kernel, why.
inline std::string cuda_variant_text(const Arguments& arguments) {
  if (arguments.empty()) return "nothing to launch";
  return takes_patches(arguments.params) ? "patches as matrix products" : cuda_variant(arguments.params);
}

inline Results cuda_update(const Arguments& arguments, const Tensor& x, const Tensor& costate, const Tensor& weight,
                           CudaStream stream) {
  const Params& params = arguments.params;
  if (arguments.empty()) {  // sums over nothing are zero
    const Results results = arguments.results();
    Tensor gradients[] = {std::get<2>(results), std::get<3>(results), std::get<4>(results), std::get<5>(results)};
    for (Tensor& gradient : gradients) torch::stable::zero_(gradient);
    return results;
  }
  Status status;
  if (takes_patches(params)) {
    status = patch_update(params, costate, stream);
  } else {
    const Tensor workspace = torch::stable::new_empty(x, {first_layer_update_cuda_workspace(params)}, ScalarType::Byte);
    status = first_layer_update_cuda(params, workspace.data_ptr(), stream);
  }
  STD_TORCH_CHECK(status.ok(), "yopo_ext::first_layer_update (CUDA, ", cuda_variant_text(arguments), ") on x ",
                  shape(x), ", weight ", shape(weight), ", costate ", shape(costate), ": ", status.error);
  return arguments.results();  // after the launch: it may copy the gradient into the weight's strides
}

}  // namespace yopo
