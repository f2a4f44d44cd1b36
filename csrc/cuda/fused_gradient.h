// The fused kernel's input gradient: T = q W by mma, band by band, and the sum of what every pixel sends.
#pragma once

#include "cuda/fused_tile.h"

namespace yopo::cuda {

template <class V>
struct FusedGradient : FusedTile<V> {
  using Base = FusedTile<V>;
  using Base::args, Base::p, Base::plan, Base::weight, Base::bias, Base::sums, Base::u, Base::g, Base::exchange,
      Base::offsets;
  using Base::Base;
  using Base::C, Base::H, Base::W, Base::K, Base::OH, Base::OW, Base::R, Base::S, Base::columns, Base::group,
      Base::member;
  using Base::image, Base::y0, Base::y1, Base::o0, Base::o1, Base::u_top;
  using Base::kThreads, Base::kWarps, Base::kPrecise, Base::kRow, Base::kTiles, Base::kResultTiles;
  using Base::stride, Base::moves, Base::wants_sums, Base::wants_output, Base::constant, Base::pixels, Base::row_of;
  using Base::take_tile, Base::load_input, Base::for_rows, Base::dilation_h, Base::dilation_w, Base::kKnown,
      Base::kGeometry;
  using Base::u_base, Base::image_of, Base::costate_offset, Base::normalised, Base::load_parameters, Base::image_in;
  using typename Base::Costate;

  // Costates of 16 pixels by 8 * kChunk kernels: [pixel][kernel], kernels 2 * member and the next of every k-step.
  template <int kChunk>
  using Chunk = float[kChunk][2][2];
  static_assert(kRow.band_pixels <= 16 * kWarps, "a warp takes at most 16 pixels of a band");

  // This lane's first of two neighbouring pixels in the band that starts at `begin`.
  YOPO_DEVICE int pixel_in_band(int begin) const { return begin + warp() * 16 + 2 * group; }
  YOPO_DEVICE bool takes_part(int begin, int count) const {
    return warp() * 16 < kRow.band_pixels && begin + warp() * 16 < count;
  }

  template <int kChunk>
  YOPO_DEVICE void load_chunk(Chunk<kChunk>& q, const CostateImage<Costate>& costates, int begin, int count,
                              int k0) const {
    const int pixel = pixel_in_band(begin);
    const bool valid0 = pixel < count, valid1 = pixel + 1 < count;
    const int offset0 = valid0 ? costate_offset(costates, pixel) : 0;
    const int offset1 = valid1 ? costate_offset(costates, pixel + 1) : 0;
    costates.with_pairs([&](auto pairs) {
#pragma unroll
      for (int step = 0; step < kChunk; ++step)
        costates.load_block(pairs, q[step], offset0, offset1, valid0, valid1, k0 + step * 8 + 2 * member);
    });
  }

  // Asks for the next band's costates while this one is computed, without a register.
  YOPO_DEVICE void prefetch_band(const CostateImage<Costate>& costates, int begin, int count) const {
    const int pixel = pixel_in_band(begin);
    if (pixel + 1 >= count) return;
    const int offset0 = costate_offset(costates, pixel), offset1 = costate_offset(costates, pixel + 1);
    for (int k = 0; k < K; k += 8) costates.prefetch_block(offset0, offset1, k + 2 * member);
  }

  // ---- 3) T of one band of pixels: 16 per warp; K is a multiple of 8 * kChunk ----
  template <int kChunk>
  YOPO_DEVICE void multiply_band(const CostateImage<Costate>& costates, int begin, int count, float* to) const {
    const int pixel = pixel_in_band(begin);
    const int base0 = V::kAffine || pixel >= count ? 0 : u_base(pixel);
    const int base1 = V::kAffine || pixel + 1 >= count ? 0 : u_base(pixel + 1);
    float seen[kKeepsSeen ? kTiles : 1][4];
    if constexpr (kKeepsSeen) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) see(seen[tile], tile, base0, base1);
    }
    float t[kTiles][4] = {};
    for (int k0 = 0; k0 < K; k0 += kChunk * 8) {
      Chunk<kChunk> q;
      load_chunk<kChunk>(q, costates, begin, count, k0);
      if (k0 == 0) prefetch_band(costates, begin + kRow.band_pixels, count);
#pragma unroll
      for (int step = 0; step < kChunk; ++step) {
        const int k = k0 + step * 8;
        if constexpr (!V::kAffine) multiply_by_slope(q[step], seen, base0, base1, k);
        // Rows: pixels; columns member, member + 4: kernels 2 * member, 2 * member + 1.
        Operand<kPrecise, 4, V::kExact> a;
        a.set(0, q[step][0][0]), a.set(1, q[step][1][0]), a.set(2, q[step][0][1]), a.set(3, q[step][1][1]);
        const float* w = weight + (k + 2 * member) * kRow.weight_stride() + group;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          Operand<kPrecise, 2> b;
          b.set_rounded(0, w[tile * 8]), b.set_rounded(1, w[kRow.weight_stride() + tile * 8]);
          multiply_add<kPrecise>(t[tile], a, b);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int column = tile * 8 + 2 * member;
      float* at = to + column * kRow.band_stride() + pixel - begin;
      if (column < columns) store_pair(at, t[tile][0], t[tile][2]);
      if (column + 1 < columns) store_pair(at + kRow.band_stride(), t[tile][1], t[tile][3]);
    }
  }

  // What this lane's two pixels see of u at columns member and member + 4 of a tile: the same for every kernel, so kept
  // where there are registers for it.
  static constexpr bool kKeepsSeen = !V::kAffine && kTiles <= 4;
  YOPO_DEVICE void see(float (&v)[4], int tile, int base0, int base1) const {
    const int near = offsets[tile * 8 + member], far = offsets[tile * 8 + member + 4];
    v[0] = u[base0 + near], v[1] = u[base1 + near], v[2] = u[base0 + far], v[3] = u[base1 + far];
  }

  // q *= act'(z) for kernels k + 2 * member, + 1
  template <int kKept>
  YOPO_DEVICE void multiply_by_slope(float (&q)[2][2], const float (&seen)[kKept][4], int base0, int base1,
                                     int k) const {
    const float bias0 = bias[k + 2 * member], bias1 = bias[k + 2 * member + 1];
    float z[4] = {bias0, bias1, bias0, bias1};
    const float* w = weight + (k + group) * kRow.weight_stride() + member;
#pragma unroll V::kUnroll
    for (int step = 0; step < kTiles; ++step) {
      float v[4];
      if constexpr (!kKeepsSeen) see(v, step, base0, base1);
      Operand<kPrecise, 4> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) a.set_rounded(i, kKeepsSeen ? seen[kKeepsSeen ? step : 0][i] : v[i]);
      Operand<kPrecise, 2> b;
      b.set_rounded(0, w[step * 8]), b.set_rounded(1, w[step * 8 + 4]);
      multiply_add<kPrecise>(z, a, b);
    }
    const float slope = float(p.negative_slope);
    q[0][0] *= slope_of<V::kActivation>(p.activation, z[0], slope);
    q[0][1] *= slope_of<V::kActivation>(p.activation, z[1], slope);
    q[1][0] *= slope_of<V::kActivation>(p.activation, z[2], slope);
    q[1][1] *= slope_of<V::kActivation>(p.activation, z[3], slope);
  }

  // ---- 4) g += what the band's pixels send to every input element; one thread owns an element ----
  YOPO_DEVICE void gather_band(int begin, int end, const float* from) const {
    const int pad_h = int(p.padding[0]), pad_w = int(p.padding[1]);
    int low = (o0 + row_of(begin)) * stride() - pad_h,
        high = (o0 + row_of(end - 1)) * stride() - pad_h + (R - 1) * dilation_h() + 1;
    low = low > y0 ? low : y0;
    high = high < y1 ? high : y1;
    for_rows(high - low, [&](int c, int row) {
      const int y = low + row;
      float* g_row = g + (c * plan.g_rows + y - y0) * W;
      for (int x = lane(); x < W; x += 32) {
        if constexpr (kKnown) {
          g_row[x] += received_known(begin, end, from, c, y + pad_h, x + pad_w);
        } else {
          g_row[x] += received(begin, end, from, c, y + pad_h, x + pad_w);
        }
      }
    });
  }

  // What the pixels of a band [begin, end) of T send to element (y, x) of channel c, counted from the padding's corner.
  YOPO_DEVICE float received(int begin, int end, const float* from, int c, int y, int x) const {
    const int log_stride = stride() - 1, odd = stride() - 1;  // strides 1 and 2
    float sum = 0.0f;
    for (int r = 0; r < R; ++r) {
      const int ty = y - r * dilation_h(), oy = ty >> log_stride;
      if (ty < 0 || (ty & odd) != 0 || oy < o0 || oy >= o1) continue;
      const int row = (oy - o0) * OW - begin;
      if (row + OW <= 0 || row >= end - begin) continue;
      const float* column = from + (c * R + r) * S * kRow.band_stride();
      for (int s = 0; s < S; ++s) {
        const int tx = x - s * dilation_w(), ox = tx >> log_stride;
        const unsigned local = unsigned(row + ox);
        if (tx >= 0 && (tx & odd) == 0 && ox < OW && local < unsigned(end - begin))
          sum += column[s * kRow.band_stride() + local];
      }
    }
    return sum;
  }

  // The same for the row's own geometry: with stride 2, only taps of the element's own parity.
  YOPO_DEVICE float received_known(int begin, int end, const float* from, int c, int y, int x) const {
    constexpr int kStride = kGeometry.stride, kRows = kGeometry.rows, kCols = kGeometry.cols;
    constexpr int kVisitedRows = (kRows + kStride - 1) / kStride, kVisitedCols = (kCols + kStride - 1) / kStride;
    const unsigned uy = unsigned(y), ux = unsigned(x);
    const int first_r = int(uy % kStride), first_s = int(ux % kStride), oy0 = int(uy / kStride),
              ox0 = int(ux / kStride);
    const unsigned count = unsigned(end - begin);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVisitedRows; ++i) {
      const int r = first_r + i * kStride, oy = oy0 - i;
      if ((kStride > 1 && r >= kRows) || oy < o0 || oy >= o1) continue;
      const int row = (oy - o0) * OW - begin;
      if (row + OW <= 0 || row >= end - begin) continue;
      const float* column = from + ((c * kRows + r) * kCols + first_s) * kRow.band_stride() + row;
#pragma unroll
      for (int j = 0; j < kVisitedCols; ++j) {
        const int ox = ox0 - j;
        const bool tap = j * kStride + kStride <= kCols || first_s + j * kStride < kCols;
        if (tap && unsigned(ox) < unsigned(OW) && unsigned(row + ox) < count)
          sum += column[j * kStride * kRow.band_stride() + ox];
      }
    }
    return sum;
  }

  YOPO_DEVICE void accumulate_gradient() {
    if (K % (8 * V::kChunk) == 0) return accumulate_in_chunks<V::kChunk>();
    if constexpr (V::kChunk > 2) accumulate_in_chunks<2>();  // K is a multiple of 16
  }

  template <int kChunk>
  YOPO_DEVICE void accumulate_in_chunks() {
    const CostateImage<Costate> costates = image_of(p.costate, p.costate_strides, args.costate_pairs);
    const int count = pixels();
    const int buffer = round_up(columns * kRow.band_stride(), 32);
    int band = 0;
    for (int begin = 0; begin < count; begin += kRow.band_pixels, ++band) {
      const int end = begin + kRow.band_pixels < count ? begin + kRow.band_pixels : count;
      float* to = exchange + band % kRow.band_buffers * buffer;
      if (takes_part(begin, count)) multiply_band<kChunk>(costates, begin, count, to);
      sync<20>();  // T is complete
      gather_band(begin, end, to);
      if (kRow.band_buffers == 1 && end < count) sync<21>();  // T may be overwritten
    }
    sync<22>();  // g is complete
  }
};

}  // namespace yopo::cuda
