// Layer 2. Patch embeddings: the kernels of cuda/patches.h around three matrix products of the library.
#pragma once

#include "launch.h"
#include "torch/arguments.h"

namespace yopo {

// Fills the results that `params` points to. `costate` is the tensor params.costate came from.
inline Status patch_update(const Params& p, const Tensor& costate, CudaStream stream) {
  using namespace torch::stable;
  // bf16 products where rounding like tf32 is allowed (fp16 would overflow under a gradient scaler), else fp32.
  const bool narrow = p.allow_tf32 && p.costate_dtype == DType::kBFloat16;
  const ScalarType type = narrow ? ScalarType::BFloat16 : ScalarType::Float;
  const int64_t pixels = p.out_height * p.out_width, columns = p.channels * p.rows * p.cols, rows = p.batch * pixels;
  auto matrix = [&](int64_t r, int64_t c) { return new_empty(costate, {r, c}, type); };
  const bool wants_sums = p.grad_weight != nullptr, wants_output = p.output != nullptr;

  PatchMatrices m{};
  m.dtype = narrow ? DType::kBFloat16 : DType::kFloat32;
  const Tensor workspace = new_empty(costate, {patch_workspace(p)}, ScalarType::Byte);
  const Tensor weight = matrix(p.kernels, columns);
  m.weight = weight.data_ptr();
  Status status = patch_weight(p, m, stream);
  if (!status.ok()) return status;

  // 1) g of every patch; a channels_last costate is the matrix as it lies
  const Tensor by_pixel = reshape(transpose(flatten(costate, 2, 3), 1, 2), {rows, p.kernels});
  const Tensor costates = to(by_pixel, type);
  const Tensor gradient = contiguous(matmul(costates, weight));
  // 2) the steps
  Tensor patches;
  m.gradient = gradient.data_ptr();
  if (wants_sums || wants_output) patches = matrix(rows, columns), m.patches = patches.data_ptr();
  status = patch_step(p, m, workspace.data_ptr(), stream);
  if (!status.ok()) return status;
  // 3) the output
  if (wants_output) {
    const Tensor product = contiguous(matmul(patches, transpose(weight, 0, 1)));
    m.product = product.data_ptr();
    status = patch_output(p, m, stream);
    if (!status.ok()) return status;
  }
  // 4) the weight gradients
  if (wants_sums) {
    const Tensor sums = contiguous(matmul(transpose(costates, 0, 1), patches));
    const std::vector<int64_t> first = {0};
    const Tensor costate_sums = contiguous(sum(by_pixel, first, false, ScalarType::Float));
    m.weight_sums = sums.data_ptr(), m.costate_sums = costate_sums.data_ptr();
    status = patch_sums(p, m, workspace.data_ptr(), stream);
  }
  return status;
}

}  // namespace yopo
