#include <algorithm>
#include <cstdlib>
#include <initializer_list>

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
  a.cols_reciprocal = uint32_t(((uint64_t(1) << 32) + p.cols - 1) / p.cols);
  return a;
}

// A warp per row.
Status over(void (*kernel)(PatchArgs), const PatchArgs& args, int64_t rows, CudaStream stream) {
  constexpr int kRows = kPatchThreads / 32;
  const int64_t blocks = (rows + kRows - 1) / kRows, most = int64_t(device_limits().processors) * 16;
  return launch(kernel, args, int(blocks < most ? blocks : most), kPatchThreads, 0, stream);
}

}  // namespace

Status prepare_patches() {
  for (auto* kernel : {patch_step_kernel, patch_output_kernel, patch_sums_kernel, patch_weight_kernel}) {
    const Status status = prepare(kernel);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace cuda

bool takes_patches(const Params& p) {
  constexpr int64_t kMost = 0x7FFFFFFF;
  const bool patches = p.rows == p.stride[0] && p.cols == p.stride[1] && p.padding[0] == 0 && p.padding[1] == 0 &&
                       p.dilation[0] == 1 && p.dilation[1] == 1 && p.groups == 1;
  const int64_t pixels = p.batch * p.out_height * p.out_width, columns = p.channels * p.rows * p.cols;
  int64_t row_span = p.cols;  // the reciprocal of `cols` is exact for columns whose product with it fits 32 bits
  for (const auto* strides : {&p.x_strides, &p.eta_strides, &p.eta_out_strides})
    row_span = std::max(row_span, std::abs((*strides)[3]));
  const bool indexed = pixels * columns <= kMost && pixels * p.kernels <= kMost && p.kernels * (columns + 1) <= kMost &&
                       p.batch * p.channels * p.height <= kMost && p.width * row_span <= kMost;
  return patches && indexed && p.affine() && p.norm == Norm::kLinf && p.compute == DType::kFloat32 &&
         p.costate_dtype != DType::kFloat64 && columns >= 32 && cuda::select_kernel(p, cuda::device_limits()).general();
}

int64_t patch_workspace(const Params& p) {
  return cuda::constants_offset(p) + cuda::kConstants * p.channels * int64_t(sizeof(double));
}

Status patch_weight(const Params& p, const PatchMatrices& m, CudaStream stream) {
  const Status status = cuda::prepare_device();  // of the update: this is its first launch
  if (!status.ok()) return status;
  const cuda::PatchArgs args = cuda::args_of(p, m, nullptr);
  return cuda::over(cuda::patch_weight_kernel, args, p.kernels, stream);
}

Status patch_step(const Params& p, const PatchMatrices& m, void* workspace, CudaStream stream) {
  cuda::PatchArgs args = cuda::args_of(p, m, workspace);
  const Status status = cuda::prepare_constants(p, static_cast<char*>(workspace) + cuda::constants_offset(p),
                                                args.update.constants, stream);
  if (!status.ok()) return status;
  return cuda::over(cuda::patch_step_kernel, args, p.batch * p.channels * p.height, stream);
}

Status patch_output(const Params& p, const PatchMatrices& m, CudaStream stream) {
  return cuda::over(cuda::patch_output_kernel, cuda::args_of(p, m, nullptr), p.batch * p.out_height * p.out_width,
                    stream);
}

Status patch_sums(const Params& p, const PatchMatrices& m, void* workspace, CudaStream stream) {
  const cuda::PatchArgs args = cuda::args_of(p, m, workspace);
  const Status status = cuda::over(cuda::patch_sums_kernel, args, p.kernels, stream);
  return status.ok() ? cuda::launch_reduce(args.update, stream) : status;
}

}  // namespace yopo
