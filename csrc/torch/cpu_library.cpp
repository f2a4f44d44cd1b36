// Layer 2. Registers the CPU kernels of the operators (schemas: yopo_ext/kernels/ops.py).
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

Results update(const Arguments& arguments, const Tensor&, const Tensor&, const Tensor&) {
  if (arguments.empty()) {
    fill_zero(arguments.results());
    return arguments.results();
  }
  const Status status = first_layer_update_cpu(arguments.params, {parallel_for});
  STD_TORCH_CHECK(status.ok(), "yopo_ext::first_layer_update (CPU, ", cpu_isa(), "): ", status.error);
  return arguments.results();
}

std::string variant(const Arguments&, const Tensor&, const Tensor&, const Tensor&) { return cpu_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yopo_ext, CPU, m) {
  m.impl("first_layer_update", TORCH_BOX((&with_arguments<Results, update>)));
  m.impl("first_layer_variant", TORCH_BOX((&with_arguments<std::string, variant>)));
}

}  // namespace yopo

extern "C" __attribute__((visibility("default"))) const char* yopo_ext_cpu_isa() { return yopo::cpu_isa(); }
