// yopo_ext_emulated: the operators through the CUDA library's glue, on CPU tensors and emulated kernels.
#include "emulation/fibers.h"
#include "torch/cuda_update.h"

namespace yopo {
namespace {

Results update(const Arguments& arguments, const Tensor& x, const Tensor& costate, const Tensor& weight) {
  return cuda_update(arguments, x, costate, weight, nullptr);
}

std::string variant(const Arguments& arguments, const Tensor&, const Tensor&, const Tensor&) {
  return cuda_variant_text(arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yopo_ext_emulated, CPU, m) {
  m.impl("first_layer_update", TORCH_BOX((&with_arguments<Results, update>)));
  m.impl("first_layer_variant", TORCH_BOX((&with_arguments<std::string, variant>)));
}

}  // namespace yopo
