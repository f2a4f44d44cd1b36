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
  uint32_t cols_reciprocal;  // ceil(2^32 / cols), where cols > 1
};

// Tasks are rows, one warp each: indices are divided once a row, and fit 32 bits (`takes_patches` checks).
YOPO_DEVICE unsigned first_row() { return unsigned(block()) * (kPatchThreads / 32) + warp(); }
YOPO_DEVICE unsigned row_step() { return unsigned(blocks()) * (kPatchThreads / 32); }

// f(a pointer to elements of the matrices): the dtype is chosen once, not per element.
template <class F>
YOPO_DEVICE void with_matrix(const void* data, DType dtype, F&& f) {
  if (dtype == DType::kFloat32) return f(static_cast<const float*>(data));
  f(static_cast<const BFloat16*>(data));
}
YOPO_DEVICE void store_element(float* at, float value) { st_stream(at, value); }
YOPO_DEVICE void store_element(BFloat16* at, float value) {
  st_stream(reinterpret_cast<uint16_t*>(at), bfloat_from_float(value));
}

// One row y of channel c of image b.
template <bool kMask, class Element>
YOPO_DEVICE void patch_step_row(const PatchArgs& args, const Element* gradients, unsigned b, unsigned c, unsigned y) {
  const Params& p = args.update.params;
  const ConstantTable& constants = args.update.constants;
  const unsigned W = unsigned(p.width), R = unsigned(p.rows), S = unsigned(p.cols), C = unsigned(p.channels);
  const unsigned OW = unsigned(p.out_width), patch_row = y / R;
  auto row_of = [&](auto* data, const int64_t (&s)[4]) { return data + (b * s[0] + c * s[1] + y * s[2]); };
  const float* x = row_of(static_cast<const float*>(p.x), p.x_strides);
  const float* from = row_of(static_cast<const float*>(p.eta), p.eta_strides);
  float* to = row_of(static_cast<float*>(p.eta_out), p.eta_out_strides);
  const int x_stride = int(p.x_strides[3]), from_stride = int(p.eta_strides[3]), to_stride = int(p.eta_out_strides[3]);
  const float eps = constants.get<float>(kEps, c), lo = constants.get<float>(kLo, c), hi = constants.get<float>(kHi, c);
  const float sigma = constants.get<float>(kStepSize, c);
  const bool normalises = constants.present(kMean);
  const float mean = normalises ? constants.get<float>(kMean, c) : 0.0f;
  const float deviation = normalises ? constants.get<float>(kStd, c) : 1.0f;
  // Element (c, y, column) lies in the matrices at `base + column + column / S * jump`, where it lies in a patch.
  const bool inside = patch_row < unsigned(p.out_height);
  const unsigned base = ((b * unsigned(p.out_height) + patch_row) * OW * C + c) * R * S + (y - patch_row * R) * S;
  const unsigned jump = (C * R - 1) * S;
  Element* patches = static_cast<Element*>(args.matrices.patches);
  for (unsigned column = lane(); column < W; column += 32) {
    const unsigned patch = S == 1 ? column : multiply_high(column, args.cols_reciprocal),
                   index = base + column + patch * jump;
    const bool in_patch = inside && patch < OW;
    const float pixel = x[int(column) * x_stride];
    const float gradient = in_patch ? load_element(gradients + index) : 0.0f;  // (std > 0 changes no sign)
    const float eta = linf_steps<kMask>(from[int(column) * from_stride], gradient,
                                        admissible_interval(pixel, eps, lo, hi), sigma, long(p.steps));
    to[int(column) * to_stride] = eta;
    if (!in_patch || patches == nullptr) continue;
    float u = pixel + eta;
    if (normalises) u = (u - mean) / deviation;
    store_element(patches + index, u);
  }
}

template <bool kMask>
YOPO_DEVICE void patch_steps(const PatchArgs& args) {
  const Params& p = args.update.params;
  const unsigned C = unsigned(p.channels), H = unsigned(p.height), rows = unsigned(p.batch) * C * H;
  with_matrix(args.matrices.gradient, args.matrices.dtype, [&](auto* gradients) {
    for (unsigned row = first_row(); row < rows; row += row_step()) {
      const unsigned plane = row / H, b = plane / C;
      patch_step_row<kMask>(args, gradients, b, plane - b * C, row - plane * H);
    }
  });
}

__global__ void __launch_bounds__(kPatchThreads) patch_step_kernel(const __grid_constant__ PatchArgs args) {
  args.update.params.mask_start ? patch_steps<true>(args) : patch_steps<false>(args);
}

// One pixel's outputs per warp, in the product's order.
__global__ void __launch_bounds__(kPatchThreads) patch_output_kernel(const __grid_constant__ PatchArgs args) {
  const Params& p = args.update.params;
  const unsigned pixels = unsigned(p.out_height * p.out_width), OW = unsigned(p.out_width), K = unsigned(p.kernels);
  const float *bias = static_cast<const float*>(p.bias), *scale = static_cast<const float*>(p.scale);
  const float* shift = static_cast<const float*>(p.shift);
  with_matrix(args.matrices.product, args.matrices.dtype, [&](auto* product) {
    for (unsigned row = first_row(); row < unsigned(p.batch) * pixels; row += row_step()) {
      const unsigned b = row / pixels, pixel = row - b * pixels, oy = pixel / OW;
      const int64_t to = b * p.output_strides[0] + oy * p.output_strides[2] + (pixel - oy * OW) * p.output_strides[3];
      for (unsigned k = lane(); k < K; k += 32) {
        float value = bias ? bias[k] : 0.0f;
        if (scale) value *= scale[k];
        if (shift) value += shift[k];
        value += load_element(product + row * K + k);
        store_as<float>(p.output, p.costate_dtype, to + k * p.output_strides[1], value);
      }
    }
  });
}

// D and the costate's sums as the one partial sum of `reduce_kernel`; a kernel per warp.
__global__ void __launch_bounds__(kPatchThreads) patch_sums_kernel(const __grid_constant__ PatchArgs args) {
  const Params& p = args.update.params;
  const unsigned columns = unsigned(args.update.partial.columns);
  float* sums = static_cast<float*>(args.update.partial.data);
  with_matrix(args.matrices.weight_sums, args.matrices.dtype, [&](auto* products) {
    for (unsigned k = first_row(); k < unsigned(p.kernels); k += row_step())
      for (unsigned column = lane(); column <= columns; column += 32)
        sums[k * (columns + 1) + column] = column == columns ? static_cast<const float*>(args.matrices.costate_sums)[k]
                                                             : load_element(products + k * columns + column);
  });
}

// W with the per-channel scale folded in, in the products' dtype; a kernel per warp.
__global__ void __launch_bounds__(kPatchThreads) patch_weight_kernel(const __grid_constant__ PatchArgs args) {
  const Params& p = args.update.params;
  const unsigned columns = unsigned(args.update.partial.columns);
  const float* weight = static_cast<const float*>(p.weight);
  for (unsigned k = first_row(); k < unsigned(p.kernels); k += row_step()) {
    const float scale = p.scale ? static_cast<const float*>(p.scale)[k] : 1.0f;
    for (unsigned column = lane(); column < columns; column += 32)
      store_as<float>(args.matrices.weight, args.matrices.dtype, k * columns + column,
                      weight[k * columns + column] * scale);
  }
}

}  // namespace yopo::cuda
