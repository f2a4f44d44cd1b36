#include "cuda/patch_kernels.h"
#include "cuda/reduce_kernel.h"
#include "cuda/select.h"

namespace yopo {
namespace cuda {
namespace {

// The workspace: the one partial sum, then per-channel constants where they are many.
int64_t constants_offset(const Params& p) {
  const int64_t sums = p.kernels * (p.channels * p.rows * p.cols + 1) * int64_t(sizeof(float));
  return (sums + 255) / 256 * 256;
}

PatchArgs args_of(const Params& p, const PatchMatrices& matrices, void* workspace) {
  PatchArgs a{};
  a.update.params = p;
  a.update.partial = {workspace, 1, int(p.channels * p.rows * p.cols)};
  a.matrices = matrices;
  return a;
}

Status over(void (*kernel)(PatchArgs), const PatchArgs& args, int64_t elements, CudaStream stream) {
  const int64_t blocks = (elements + kPatchThreads - 1) / kPatchThreads,
                most = int64_t(device_limits().processors) * 16;
  return launch(kernel, args, int(blocks < most ? blocks : most), kPatchThreads, 0, stream);
}

}  // namespace
}  // namespace cuda

bool takes_patches(const Params& p) {
  const bool patches = p.rows == p.stride[0] && p.cols == p.stride[1] && p.padding[0] == 0 && p.padding[1] == 0 &&
                       p.dilation[0] == 1 && p.dilation[1] == 1 && p.groups == 1;
  return patches && p.affine() && p.norm == Norm::kLinf && p.compute == DType::kFloat32 &&
         p.costate_dtype != DType::kFloat64 && p.channels * p.rows * p.cols >= 32 &&
         cuda::select_kernel(p, cuda::device_limits()).general();
}

int64_t patch_workspace(const Params& p) {
  return cuda::constants_offset(p) + cuda::kConstants * p.channels * int64_t(sizeof(double));
}

Status patch_weight(const Params& p, const PatchMatrices& m, CudaStream stream) {
  const cuda::PatchArgs args = cuda::args_of(p, m, nullptr);
  return cuda::over(cuda::patch_weight_kernel, args, p.kernels * args.update.partial.columns, stream);
}

Status patch_step(const Params& p, const PatchMatrices& m, void* workspace, CudaStream stream) {
  cuda::PatchArgs args = cuda::args_of(p, m, workspace);
  const Status status = cuda::prepare_constants(p, static_cast<char*>(workspace) + cuda::constants_offset(p),
                                                args.update.constants, stream);
  if (!status.ok()) return status;
  return cuda::over(cuda::patch_step_kernel, args, p.batch * p.channels * p.height * p.width, stream);
}

Status patch_output(const Params& p, const PatchMatrices& m, CudaStream stream) {
  return cuda::over(cuda::patch_output_kernel, cuda::args_of(p, m, nullptr),
                    p.batch * p.kernels * p.out_height * p.out_width, stream);
}

Status patch_sums(const Params& p, const PatchMatrices& m, void* workspace, CudaStream stream) {
  const cuda::PatchArgs args = cuda::args_of(p, m, workspace);
  const Status status =
      cuda::over(cuda::patch_sums_kernel, args, p.kernels * (args.update.partial.columns + 1), stream);
  return status.ok() ? cuda::launch_reduce(args.update, stream) : status;
}

}  // namespace yopo
