// What the kernels are launched with: the parameters, with host constants replaced by ones a device can read.
#pragma once

#include "core/params.h"
#include "cuda/primitives.h"

namespace yopo::cuda {

enum Constant : int { kMean = 0, kStd = 1, kStepSize = 2, kEps = 3, kLo = 4, kHi = 5, kConstants = 6 };

// Per-channel constants travel with the launch where they are few, through the workspace where they are many.
struct ConstantTable {
  static constexpr int kInline = 32;
  double values[kConstants][kInline];
  const double* many;  // [kConstants][channels], or null
  int counts[kConstants];
  int channels;

  template <class T>
  YOPO_DEVICE T get(Constant which, int channel) const {
    const int i = counts[which] == 1 ? 0 : channel;
    return T(many ? many[int64_t(which) * channels + i] : values[which][i]);
  }
  YOPO_DEVICE bool present(Constant which) const { return counts[which] > 0; }
};

// Partial sums D = sum q * u over an image set: one row of columns + 1 per kernel; the last column is sum q.
// dW = scale * D, db = scale * sum q, dshift = sum q, dscale = <W, D> + bias * sum q.
struct PartialSums {
  void* data;   // [count, kernels, columns + 1] of the compute dtype
  int count;    // one per block
  int columns;  // channels / groups * rows * cols
};

struct UpdateArgs {
  Params params;
  ConstantTable constants;
  PartialSums partial;
  void* costate_scratch;   // general kernel: q, [blocks, K * OH * OW] of the compute dtype
  void* gradient_scratch;  // general kernel: g, [blocks, C * H * W] of the compute dtype
};

}  // namespace yopo::cuda
