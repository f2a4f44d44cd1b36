// The fused kernel's results at eta': the output and the sums for the weight gradients, both by mma.
#pragma once

#include "cuda/fused_gradient.h"

namespace yopo::cuda {

template <class V>
struct FusedResults : FusedGradient<V> {
  using Base = FusedGradient<V>;
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

  static constexpr int kPixelTiles = V::kPixelTiles;

  // ---- 6) y = act(z) and D at eta', 8 * kPixelTiles pixels per warp at a time ----
  YOPO_DEVICE void results() {
    if (K % (16 * kResultTiles) == 0) return results_in_slices<kResultTiles>();
    if constexpr (kResultTiles > 1) results_in_slices<1>();  // K is a multiple of 16
  }

  template <int kMTiles>
  YOPO_DEVICE void results_in_slices() {
    const CostateImage<Costate> costates = image_of(p.costate, p.costate_strides, args.costate_pairs);
    const CostateImage<Costate> outputs = image_of(p.output, p.output_strides, args.output_pairs);
    const int count = pixels(), slice = 16 * kMTiles, slices = K / slice;
    const int together = slices < kWarps ? slices : kWarps, members = kWarps / together;
    for (int first = 0; first < slices; first += together) {
      const int mine = first + warp() % together,
                order = warp() / together;  // which kernels, which share of the pixels
      const bool works = mine < slices && order < members;
      float d[kMTiles][kTiles][4] = {};
      if (works)
        for (int pixel = order * 8 * kPixelTiles; pixel < count; pixel += members * 8 * kPixelTiles)
          results_of_tile<kMTiles>(costates, outputs, pixel, count, mine * slice, d);
      if (!wants_sums()) continue;
      for (int turn = 0; turn < members; ++turn) {  // a fixed order of addition
        if (works && turn == order) add_sums<kMTiles>(mine * slice, d);
        sync<23>();
      }
    }
  }

  // [n-tile][m-tile][pixel][kernel]. Rows of a fragment: kernels 2 * group, + 1 of each m-tile. Columns: pixels
  // 2 * member, + 1 of each n-tile.
  template <int kMTiles>
  using Costates = float[kPixelTiles][kMTiles][2][2];

  template <int kMTiles>
  YOPO_DEVICE void load_costates(Costates<kMTiles>& q, const CostateImage<Costate>& costates, int pixel, int count,
                                 int k0) const {
    costates.with_pairs([&](auto pairs) {
#pragma unroll
      for (int n = 0; n < kPixelTiles; ++n) {
        const int first = pixel + n * 8 + 2 * member;
        const int offset0 = first < count ? costate_offset(costates, first) : 0;
        const int offset1 = first + 1 < count ? costate_offset(costates, first + 1) : 0;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
          costates.load_block(pairs, q[n][m], offset0, offset1, first < count, first + 1 < count,
                              k0 + m * 16 + 2 * group);
      }
    });
  }

  template <int kMTiles>
  YOPO_DEVICE void results_of_tile(const CostateImage<Costate>& costates, const CostateImage<Costate>& outputs,
                                   int pixel, int count, int k0, float (&d)[kMTiles][kTiles][4]) const {
    Costates<kMTiles> q;
    if (wants_sums()) load_costates<kMTiles>(q, costates, pixel, count, k0);
    float z[kPixelTiles][kMTiles][4];  // (k, px) (k, px + 1) (k + 1, px) (k + 1, px + 1)
    int at[kPixelTiles][2], base[kPixelTiles];
    bool valid[kPixelTiles][2];
#pragma unroll
    for (int n = 0; n < kPixelTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        at[n][i] = pixel + n * 8 + 2 * member + i;
        valid[n][i] = at[n][i] < count;
      }
      base[n] = pixel + n * 8 + group < count ? u_base(pixel + n * 8 + group) : 0;
    }
    if (!V::kAffine || wants_output()) {
      compute_z<kMTiles>(z, base, k0);
      const float slope = float(p.negative_slope);
      if (wants_output())
        outputs.with_pairs([&](auto pairs) {
#pragma unroll
          for (int n = 0; n < kPixelTiles; ++n)
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
              float y[2][2];
#pragma unroll
              for (int i = 0; i < 4; ++i) y[i % 2][i / 2] = value_of<V::kActivation>(p.activation, z[n][m][i], slope);
              outputs.store_block(pairs, y, costate_offset(outputs, at[n][0]), costate_offset(outputs, at[n][1]),
                                  valid[n][0], valid[n][1], k0 + m * 16 + 2 * group);
            }
        });
      if (!V::kAffine && wants_sums()) {
#pragma unroll
        for (int n = 0; n < kPixelTiles; ++n)
#pragma unroll
          for (int m = 0; m < kMTiles; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              q[n][m][i % 2][i / 2] *= slope_of<V::kActivation>(p.activation, z[n][m][i], slope);
      }
    }
    if (wants_sums()) {
#pragma unroll
      for (int n = 0; n < kPixelTiles; ++n) {
        const int base0 = valid[n][0] ? u_base(at[n][0]) : 0, base1 = valid[n][1] ? u_base(at[n][1]) : 0;
        // Columns member, member + 4: pixels 2 * member, 2 * member + 1.
        Operand<kPrecise, 4, V::kExact> a[kMTiles];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          a[m].set(0, q[n][m][0][0]), a[m].set(1, q[n][m][0][1]), a[m].set(2, q[n][m][1][0]),
              a[m].set(3, q[n][m][1][1]);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const int near = offsets[tile * 8 + group];
          const bool ones = tile == columns / 8 && group == columns % 8;  // the last column sums q itself
          Operand<kPrecise, 2> b;
          b.set_rounded(0, ones ? 1.0f : u[base0 + near]);
          b.set_rounded(1, ones ? 1.0f : u[base1 + near]);
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) multiply_add<kPrecise>(d[m][tile], a[m], b);
        }
      }
    }
  }

  // z of 16 * kMTiles kernels at 8 * kPixelTiles pixels; base: of pixel `group` of either n-tile
  template <int kMTiles>
  YOPO_DEVICE void compute_z(float (&z)[kPixelTiles][kMTiles][4], const int (&base)[kPixelTiles], int k0) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      const int k = k0 + m * 16 + 2 * group;
      const float bias0 = bias[k], bias1 = bias[k + 1];
#pragma unroll
      for (int n = 0; n < kPixelTiles; ++n) z[n][m][0] = z[n][m][1] = bias0, z[n][m][2] = z[n][m][3] = bias1;
    }
#pragma unroll V::kUnroll
    for (int step = 0; step < kTiles; ++step) {
      const int near = offsets[step * 8 + member], far = offsets[step * 8 + member + 4];
      Operand<kPrecise, 2> b[kPixelTiles];
#pragma unroll
      for (int n = 0; n < kPixelTiles; ++n)
        b[n].set_rounded(0, u[base[n] + near]), b[n].set_rounded(1, u[base[n] + far]);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        const float* w = weight + (k0 + m * 16 + 2 * group) * kRow.weight_stride() + step * 8 + member;
        Operand<kPrecise, 4> a;
        a.set_rounded(0, w[0]), a.set_rounded(1, w[kRow.weight_stride()]);
        a.set_rounded(2, w[4]), a.set_rounded(3, w[kRow.weight_stride() + 4]);
#pragma unroll
        for (int n = 0; n < kPixelTiles; ++n) multiply_add<kPrecise>(z[n][m], a, b[n]);
      }
    }
  }

  template <int kMTiles>
  YOPO_DEVICE void add_sums(int k0, const float (&d)[kMTiles][kTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      float* row = sums + (k0 + m * 16 + 2 * group) * (columns + 1);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = tile * 8 + 2 * member + i % 2;
          if (column <= columns) row[i / 2 * (columns + 1) + column] += d[m][tile][i];
        }
    }
  }
};

}  // namespace yopo::cuda
