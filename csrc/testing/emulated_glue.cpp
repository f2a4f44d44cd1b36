// yopo_ext_emulated::first_layer_update: the CUDA library's glue, on CPU tensors and emulated kernels.
#include "emulation/fibers.h"
#include "torch/cuda_update.h"

namespace yopo {

Results first_layer_update_emulated(const Tensor& x, const Tensor& eta, const Tensor& costate, const Tensor& weight,
                                    std::optional<Tensor> bias, std::optional<Tensor> scale,
                                    std::optional<Tensor> shift, std::vector<double> mean, std::vector<double> std,
                                    std::vector<int64_t> stride, std::vector<int64_t> padding,
                                    std::vector<int64_t> dilation, int64_t groups, int64_t activation,
                                    double negative_slope, int64_t steps, std::vector<double> step_size,
                                    std::vector<double> eps, std::vector<double> lo, std::vector<double> hi,
                                    int64_t norm, bool need_output, bool need_weight_grad, bool allow_tf32) {
  const Arguments arguments(x, eta, costate, weight, bias, scale, shift, std::move(mean), std::move(std), stride,
                            padding, dilation, groups, activation, negative_slope, steps, std::move(step_size),
                            std::move(eps), std::move(lo), std::move(hi), norm, need_output, need_weight_grad,
                            allow_tf32);
  return cuda_update(arguments, x, costate, weight, nullptr);
}

STABLE_TORCH_LIBRARY(yopo_ext_emulated, m) {
  m.def(
      "first_layer_update(Tensor x, Tensor eta, Tensor costate, Tensor weight, Tensor? bias, Tensor? scale, Tensor? "
      "shift, "
      "float[] mean, float[] std, int[] stride, int[] padding, int[] dilation, int groups, int activation, "
      "float negative_slope, int steps, float[] step_size, float[] eps, float[] lo, float[] hi, int norm, "
      "bool need_output, bool need_weight_grad, bool allow_tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(yopo_ext_emulated, CPU, m) {
  m.impl("first_layer_update", TORCH_BOX(&first_layer_update_emulated));
}

}  // namespace yopo
