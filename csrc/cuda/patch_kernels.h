// Patch embeddings (kernel == stride, no padding, large): three library matrix products and what lies between them.
//
//   G = P W      [B * OH * OW, C * R * S]   -> patch_step: eta' and U = normalised x + eta', both in one pass
//   Y = U W^T    [B * OH * OW, K]           -> patch_output: bias, dtype and strides of the output
//   D = P^T U    [K, C * R * S], sum of P   -> patch_sums, then the common reduction
//
// Count, ViT 3->768 16x16/16 at 224, one image: 3 products of 0.23 GFLOP each, against p 0.6 MB, y 0.6 MB, G and U 1.2
// MB (fp32): the products are the bound, and a library's are as good as any.
#pragma once

#include "core/projection.h"
#include "cuda/args.h"
#include "cuda/costate.h"

namespace yopo::cuda {

constexpr int kPatchThreads = 256;

struct PatchArgs {
  UpdateArgs update;
  PatchMatrices matrices;
};

// Element (row, column) of the matrices that element (c, y, x) of image b lies in; -1: in no patch.
YOPO_DEVICE int64_t patch_index(const Params& p, int64_t b, int c, int y, int x) {
  const int oy = y / int(p.rows), ox = x / int(p.cols);
  if (oy >= p.out_height || ox >= p.out_width) return -1;
  const int64_t row = (b * p.out_height + oy) * p.out_width + ox;
  return (row * p.channels + c) * p.rows * p.cols + (y - oy * p.rows) * p.cols + (x - ox * p.cols);
}

YOPO_DEVICE int64_t grid_index() { return int64_t(block()) * kPatchThreads + tid(); }
YOPO_DEVICE int64_t grid_step() { return int64_t(blocks()) * kPatchThreads; }

template <bool kMask>
YOPO_DEVICE void patch_steps(const PatchArgs& args) {
  const Params& p = args.update.params;
  const ConstantTable& constants = args.update.constants;
  const int64_t count = p.batch * p.channels * p.height * p.width;
  for (int64_t i = grid_index(); i < count; i += grid_step()) {
    const int x = int(i % p.width), y = int(i / p.width % p.height), c = int(i / (p.width * p.height) % p.channels);
    const int64_t b = i / (p.width * p.height * p.channels);
    auto at = [&](const int64_t (&s)[4]) { return b * s[0] + c * s[1] + y * s[2] + x * s[3]; };
    const float pixel = static_cast<const float*>(p.x)[at(p.x_strides)];
    const int64_t index = patch_index(p, b, c, y, x);
    float gradient = index < 0 ? 0.0f : load_as<float>(args.matrices.gradient, args.matrices.dtype, index);
    if (constants.present(kStd)) gradient /= constants.get<float>(kStd, c);
    const Interval<float> box = admissible_interval(pixel, constants.get<float>(kEps, c), constants.get<float>(kLo, c),
                                                    constants.get<float>(kHi, c));
    const float eta = linf_steps<kMask>(static_cast<const float*>(p.eta)[at(p.eta_strides)], gradient, box,
                                        constants.get<float>(kStepSize, c), long(p.steps));
    static_cast<float*>(p.eta_out)[at(p.eta_out_strides)] = eta;
    if (index < 0 || args.matrices.patches == nullptr) continue;
    float u = pixel + eta;
    if (constants.present(kMean)) u = (u - constants.get<float>(kMean, c)) / constants.get<float>(kStd, c);
    store_as<float>(args.matrices.patches, args.matrices.dtype, index, u);
  }
}

__global__ void __launch_bounds__(kPatchThreads) patch_step_kernel(const __grid_constant__ PatchArgs args) {
  args.update.params.mask_start ? patch_steps<true>(args) : patch_steps<false>(args);
}

__global__ void __launch_bounds__(kPatchThreads) patch_output_kernel(const __grid_constant__ PatchArgs args) {
  const Params& p = args.update.params;
  const int64_t pixels = p.out_height * p.out_width;
  for (int64_t i = grid_index(); i < p.batch * pixels * p.kernels; i += grid_step()) {  // in the product's order
    const int64_t k = i % p.kernels, b = i / p.kernels / pixels, pixel = i / p.kernels % pixels;
    float bias = p.bias ? static_cast<const float*>(p.bias)[k] : 0.0f;
    if (p.scale) bias *= static_cast<const float*>(p.scale)[k];
    if (p.shift) bias += static_cast<const float*>(p.shift)[k];
    const int64_t to = b * p.output_strides[0] + k * p.output_strides[1] + pixel / p.out_width * p.output_strides[2] +
                       pixel % p.out_width * p.output_strides[3];
    store_as<float>(p.output, p.costate_dtype, to,
                    load_as<float>(args.matrices.product, args.matrices.dtype, i) + bias);
  }
}

// D and the costate's sums as the one partial sum of `reduce_kernel`.
__global__ void __launch_bounds__(kPatchThreads) patch_sums_kernel(const __grid_constant__ PatchArgs args) {
  const Params& p = args.update.params;
  const int columns = args.update.partial.columns;
  for (int64_t i = grid_index(); i < p.kernels * (columns + 1); i += grid_step()) {
    const int64_t k = i / (columns + 1), column = i % (columns + 1);
    static_cast<float*>(args.update.partial.data)[i] =
        column == columns ? static_cast<const float*>(args.matrices.costate_sums)[k]
                          : load_as<float>(args.matrices.weight_sums, args.matrices.dtype, k * columns + column);
  }
}

// W with the per-channel scale folded in, in the products' dtype.
__global__ void __launch_bounds__(kPatchThreads) patch_weight_kernel(const __grid_constant__ PatchArgs args) {
  const Params& p = args.update.params;
  const int columns = args.update.partial.columns;
  for (int64_t i = grid_index(); i < p.kernels * columns; i += grid_step()) {
    const float w = static_cast<const float*>(p.weight)[i];
    store_as<float>(args.matrices.weight, args.matrices.dtype, i,
                    p.scale ? w * static_cast<const float*>(p.scale)[i / columns] : w);
  }
}

}  // namespace yopo::cuda
