// Layer 2. Registers the CPU kernel of yopo_ext::first_layer_update.
#include "launch.h"
#include "torch/arguments.h"

namespace yopo {

namespace {

void parallel_for(int64_t tasks, void (*body)(int64_t begin, int64_t end, void* context), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

// Nothing to compute: sums over an empty batch are zero.
void fill_zero(const Results& results) {
  Tensor grads[] = {std::get<2>(results), std::get<3>(results), std::get<4>(results), std::get<5>(results)};
  for (Tensor& grad : grads) torch::stable::zero_(grad);
}

}  // namespace

Results first_layer_update_cpu_op(const Tensor& x, const Tensor& eta, const Tensor& costate, const Tensor& weight,
                                  std::optional<Tensor> bias, std::optional<Tensor> scale, std::optional<Tensor> shift,
                                  std::vector<double> mean, std::vector<double> std, std::vector<int64_t> stride,
                                  std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                                  int64_t activation, double negative_slope, int64_t steps,
                                  std::vector<double> step_size, std::vector<double> eps, std::vector<double> lo,
                                  std::vector<double> hi, int64_t norm, bool need_output, bool need_weight_grad,
                                  bool allow_tf32) {
  const Arguments arguments(x, eta, costate, weight, bias, scale, shift, std::move(mean), std::move(std), stride,
                            padding, dilation, groups, activation, negative_slope, steps, std::move(step_size),
                            std::move(eps), std::move(lo), std::move(hi), norm, need_output, need_weight_grad,
                            allow_tf32);
  if (arguments.empty()) {
    fill_zero(arguments.results());
    return arguments.results();
  }
  const Status status = first_layer_update_cpu(arguments.params, {parallel_for});
  STD_TORCH_CHECK(status.ok(), "yopo_ext::first_layer_update (CPU, ", cpu_isa(), "): ", status.error);
  return arguments.results();
}

STABLE_TORCH_LIBRARY_IMPL(yopo_ext, CPU, m) { m.impl("first_layer_update", TORCH_BOX(&first_layer_update_cpu_op)); }

}  // namespace yopo

extern "C" __attribute__((visibility("default"))) const char* yopo_ext_cpu_isa() { return yopo::cpu_isa(); }
