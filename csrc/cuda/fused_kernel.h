// The fused kernel: a 3x3-like first layer on tensor cores, a tile of an image per block at a time.
//
//   T[pixel, column] = sum_k q[pixel, k] W[k, column],  q = p * act'(z),  columns = (c, r, s)
//   g[c, y, x]       = sum of the R * S entries of T that see (c, y, x)
//   z[pixel, k]      = sum_column u[pixel at column] W[k, column] + bias
//   D[k, column]     = sum_pixel q[pixel, k] u[pixel at column]
//
// Scale and shift of the affine part are folded into W and the bias once per block. Costates go from global memory
// straight into mma fragments, because a fragment is a set of 2x2 blocks (two pixels, two kernels) and the order of the
// summed index is free: an accumulator of z is at once a fragment of q. So p never passes through shared memory; its
// further readings (every step of a non-linear f0, D) come from L2, which holds an image per processor (34 MB).
//
// Count, CIFAR 3->64, one image: p 256 KB and y 256 KB move; 3 products of 64 x 4 x 8 = 2048 mma (m16n8k8) each, 85 %
// of them useful columns; shared memory: weights 8000, exchange 2000, images 4000 wavefronts of 128 bytes. At two
// images per processor that is ~11 us of mma and ~16 us of shared memory beside ~33 us of device memory. Every further
// non-linear step adds 4096 mma and one reading of p.
#pragma once

#include "core/projection.h"
#include "cuda/fused_results.h"

namespace yopo::cuda {

template <class V>
struct FusedBlock : FusedResults<V> {
  using Base = FusedResults<V>;
  using Base::accumulate_gradient, Base::results;
  using Base::args, Base::p, Base::plan, Base::weight, Base::bias, Base::sums, Base::u, Base::g, Base::exchange,
      Base::offsets;
  using Base::Base;
  using Base::C, Base::H, Base::W, Base::K, Base::OH, Base::OW, Base::R, Base::S, Base::columns, Base::group,
      Base::member;
  using Base::image, Base::y0, Base::y1, Base::o0, Base::o1, Base::u_top;
  using Base::kThreads, Base::kWarps, Base::kPrecise, Base::kRow, Base::kTiles, Base::kResultTiles;
  using Base::stride, Base::moves, Base::wants_sums, Base::wants_output, Base::constant, Base::pixels, Base::row_of;
  using Base::take_tile, Base::load_input, Base::for_rows, Base::dilation_h, Base::dilation_w, Base::kKnown;
  using Base::u_base, Base::image_of, Base::costate_offset, Base::normalised, Base::load_parameters, Base::image_in;
  using typename Base::Costate;

  // ---- 5) the projected step; u follows eta ----
  YOPO_DEVICE void step(bool first, bool last) {
    if (p.mask_start)  // once, not per element
      step_as<true>(first, last);
    else
      step_as<false>(first, last);
  }

  template <bool kMask>
  YOPO_DEVICE void step_as(bool first, bool last) {
    const bool keeps_input = plan.mode == FusedMode::kResident && plan.u_rows > 0;
    const auto xs = image_in(static_cast<const float*>(p.x), p.x_strides);
    const auto from = image_in(args.eta_from, args.eta_from_strides);
    const auto to = image_in(args.eta_to, args.eta_to_strides);
    for_rows(y1 - y0, [&](int c, int row) {  // the same elements for the same thread in every step
      const int y = y0 + row;
      const float eps = constant(kEps, c), lo = constant(kLo, c), hi = constant(kHi, c), sigma = constant(kStepSize, c);
      for (int column = lane(); column < W; column += 32) {
        float& sum = g[(c * plan.g_rows + y - y0) * W + column];
        const float gradient = sum, x = xs.row(c, y)[column * xs.col_stride];  // std > 0 changes no sign
        sum = 0.0f;
        float& target = to.row(c, y)[column * to.col_stride];
        float eta = first ? from.row(c, y)[column * from.col_stride] : target;
        const Interval<float> i = admissible_interval(x, eps, lo, hi);
        if constexpr (V::kAffine) {
          eta = linf_steps<kMask>(eta, gradient, i, sigma, args.steps);
        } else if (args.steps > 0) {
          const bool masks = kMask && first && args.first;
          const float s = signed_step(gradient, sigma);
          eta = project(eta + (masks ? masked(s, eta, i.lower, i.upper) : s), i.a, i.b);
        }
        target = eta;
        const int u_row = y - u_top, u_col = column + int(p.padding[1]);
        if (keeps_input && u_row >= 0 && u_row < plan.u_rows && u_col < plan.u_cols) {
          const float value = x + eta;
          u[(c * plan.u_rows + u_row) * plan.u_cols + u_col] =
              normalised(kMask && !last ? clamp(value, lo, hi) : value, c);
        }
      }
    });
  }

  YOPO_DEVICE void run() {
    load_parameters();
    sync<27>();  // constants
    const int tiles = int(p.batch) * plan.tiles_per_image;
    for (int tile = block(); tile < tiles; tile += blocks()) {
      take_tile(tile);
      // A resident image with nothing to move still copies eta: one pass through step() without steps.
      const bool looping = plan.mode == FusedMode::kResident && !V::kAffine;
      if (plan.u_rows > 0 || plan.g_rows > 0) load_input(moves() && p.mask_start);
      sync<24>();  // u and an empty g
      if (moves()) {
        const int rounds = looping && args.steps > 1 ? args.steps : 1;
        for (int i = 0; i < rounds; ++i) {
          if (args.steps > 0) accumulate_gradient();
          step(i == 0, i == rounds - 1);
          sync<25>();  // u is complete, g empty
        }
      }
      if (wants_sums() || wants_output()) results();
      sync<26>();  // u may be overwritten
    }
    if (wants_sums()) {
      float* partial = static_cast<float*>(args.update.partial.data) + int64_t(block()) * K * (columns + 1);
      for (int i = tid(); i < K * (columns + 1); i += kThreads) partial[i] = sums[i];
    }
  }
};

template <class V>
__global__ void __launch_bounds__(V::kThreads, V::kRow.blocks_per_processor)
    fused_kernel(const __grid_constant__ FusedArgs args) {
  FusedBlock<V>(args).run();
}

}  // namespace yopo::cuda
