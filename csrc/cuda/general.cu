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

// From launch arguments into device memory: nothing on the host is read later.
Status store_constants(const Params& p, const ChannelConstant* const (&constants)[kConstants], double* to,
                       CudaStream stream) {
  for (int i = 0; i < kConstants; ++i)
    for (int first = 0; first < constants[i]->count; first += ConstantsArgs::kValues) {
      ConstantsArgs args{};
      args.count =
          constants[i]->count - first < ConstantsArgs::kValues ? constants[i]->count - first : ConstantsArgs::kValues;
      args.to = to + i * p.channels + first;
      for (int c = 0; c < args.count; ++c) args.values[c] = constants[i]->values[first + c];
      const Status status = launch(constants_kernel, args, 1, ConstantsArgs::kValues, 0, stream);
      if (!status.ok()) return status;
    }
  return {};
}

}  // namespace

Status prepare_constants(const Params& p, void* workspace, ConstantTable& table, CudaStream stream) {
  const ChannelConstant* constants[kConstants] = {&p.mean, &p.std, &p.step_size, &p.eps, &p.lo, &p.hi};
  table = {};
  table.channels = int(p.channels);
  for (int i = 0; i < kConstants; ++i) {
    table.counts[i] = constants[i]->count;
    for (int c = 0; c < constants[i]->count && c < ConstantTable::kInline; ++c)
      table.values[i][c] = constants[i]->values[c];
  }
  if (p.channels <= ConstantTable::kInline) return {};
  table.many = static_cast<const double*>(workspace);
  return store_constants(p, constants, static_cast<double*>(workspace), stream);
}

Status launch_general(const UpdateArgs& args, int blocks, CudaStream stream) {
  if (args.params.compute == DType::kFloat64)
    return launch(general_kernel<double>, args, blocks, kGeneralThreads, kGeneralSharedBytes, stream);
  return launch(general_kernel<float>, args, blocks, kGeneralThreads, kGeneralSharedBytes, stream);
}

Status prepare_general() {
  Status status = prepare(general_kernel<float>);
  if (status.ok()) status = prepare(general_kernel<double>);
  if (status.ok()) status = prepare(reduce_kernel<float>);
  if (status.ok()) status = prepare(reduce_kernel<double>);
  return status.ok() ? prepare(constants_kernel) : status;
}

Status launch_reduce(const UpdateArgs& args, CudaStream stream) {
  if (args.params.compute == DType::kFloat64)
    return launch(reduce_kernel<double>, args, int(args.params.kernels), kReduceThreads, kReduceSharedBytes, stream);
  return launch(reduce_kernel<float>, args, int(args.params.kernels), kReduceThreads, kReduceSharedBytes, stream);
}

}  // namespace yopo::cuda
