// Layer 0. The first-layer update as plain data: no torch, no CUDA, no ownership.
//
//   f0(u) = act(scale * conv2d((u - mean) / std, weight, bias) + shift)
//
// Shapes: x, eta, eta_out [B, C, H, W]; costate, output [B, K, OH, OW]; weight [K, C/groups, R, S]. Strides are in
// elements, in the order of the shape, so that NCHW, channels_last and views need no copy. `compute` is the dtype of x,
// eta, all parameters and all arithmetic; costate and output may be narrower.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace yopo {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// The integers of yopo_ext/kernels/constants.py; they are part of the operator schema.
enum class Activation : int { kIdentity = 0, kRelu = 1, kLeakyRelu = 2, kGelu = 3, kGeluTanh = 4, kSilu = 5 };
enum class Norm : int { kLinf = 0, kL2 = 1 };

// One value, or one per input channel; kernels round it to the compute dtype before any arithmetic.
struct ChannelConstant {
  const double* values = nullptr;  // host memory, alive during the call; null: absent
  int count = 0;                   // 0, 1 or C

  double operator[](int64_t channel) const { return values[count == 1 ? 0 : channel]; }
  bool present() const { return count > 0; }
};

struct Params {
  // Sizes.
  int64_t batch, channels, height, width;  // B, C, H, W
  int64_t kernels, out_height, out_width;  // K, OH, OW
  int64_t rows, cols;                      // R, S
  int64_t groups;
  int64_t stride[2], padding[2], dilation[2];  // (height, width)

  // Dtypes and memory. Pointers that are null mean: absent (inputs) or not asked for (outputs).
  DType compute;        // kFloat32 or kFloat64
  DType costate_dtype;  // and the output's
  const void* x;
  const void* eta;
  const void* costate;
  const void* weight;  // contiguous
  const void* bias;    // [K] contiguous, like scale and shift
  const void* scale;
  const void* shift;
  void* eta_out;      // x's strides
  void* output;       // the costate's strides
  void* grad_weight;  // contiguous
  void* grad_bias;
  void* grad_scale;
  void* grad_shift;
  int64_t x_strides[4];
  int64_t eta_strides[4];
  int64_t eta_out_strides[4];
  int64_t costate_strides[4];
  int64_t output_strides[4];

  // The function and the threat model.
  Activation activation;
  double negative_slope;
  ChannelConstant mean, std, step_size, eps, lo, hi;
  Norm norm;
  bool mask_start;  // every step's u is clamped to [lo, hi]; the first has no gradient where eta leaves the box
  int64_t steps;
  bool allow_tf32;

  // True if f0 is affine in u: its gradient does not depend on eta, so one is enough for any number of steps.
  YOPO_HD bool affine() const { return activation == Activation::kIdentity; }
};

}  // namespace yopo
