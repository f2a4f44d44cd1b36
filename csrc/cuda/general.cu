#include "cuda/reduce_kernel.h"
#include "cuda/select.h"

namespace yopo::cuda {
namespace {

struct ConstantsArgs {
  static constexpr int kValues = 256;
  double values[kValues];
  int count;
  double* to;
};

__global__ void __launch_bounds__(ConstantsArgs::kValues) constants_kernel(const __grid_constant__ ConstantsArgs args) {
  if (tid() < args.count) args.to[tid()] = args.values[tid()];
}

}  // namespace

Status launch_constants(const Params& p, double* to, CudaStream stream) {
  const ChannelConstant* constants[kConstants] = {&p.mean, &p.std, &p.step_size, &p.eps, &p.lo, &p.hi};
  for (int i = 0; i < kConstants; ++i)
    for (int first = 0; first < constants[i]->count; first += ConstantsArgs::kValues) {
      ConstantsArgs args{};
      args.count = constants[i]->count - first < ConstantsArgs::kValues ? constants[i]->count - first : ConstantsArgs::kValues;
      args.to = to + i * p.channels + first;
      for (int c = 0; c < args.count; ++c) args.values[c] = constants[i]->values[first + c];
      const Status status = launch(constants_kernel, args, 1, ConstantsArgs::kValues, 0, stream);
      if (!status.ok()) return status;
    }
  return {};
}

Status launch_general(const UpdateArgs& args, int blocks, CudaStream stream) {
  if (args.params.compute == DType::kFloat64)
    return launch(general_kernel<double>, args, blocks, kGeneralThreads, kGeneralSharedBytes, stream);
  return launch(general_kernel<float>, args, blocks, kGeneralThreads, kGeneralSharedBytes, stream);
}

Status launch_reduce(const UpdateArgs& args, CudaStream stream) {
  if (args.params.compute == DType::kFloat64)
    return launch(reduce_kernel<double>, args, int(args.params.kernels), kReduceThreads, kReduceSharedBytes, stream);
  return launch(reduce_kernel<float>, args, int(args.params.kernels), kReduceThreads, kReduceSharedBytes, stream);
}

}  // namespace yopo::cuda
