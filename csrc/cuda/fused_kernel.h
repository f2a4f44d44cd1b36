// The fused kernel: a 3x3-like first layer on tensor cores, a tile of an image per block at a time.
//
//   T[pixel, column] = sum_k q[pixel, k] W[k, column],  q = p * act'(z),  columns = (c, r, s)
//   g[c, y, x]       = sum of the R * S entries of T that see (c, y, x)
//   z[pixel, k]      = sum_column u[pixel at column] W[k, column] + bias
//   D[k, column]     = sum_pixel q[pixel, k] u[pixel at column]
//
// Scale and shift of the affine part are folded into W and the bias once per block. Costates go from global memory
// straight into mma fragments, because a fragment is a set of 2x2 blocks (two pixels, two kernels) and the order of the summed
// index is free: an accumulator of z is at once a fragment of q. So p never passes through shared memory; its second
// reading (for D) comes from L2.
//
// Count, CIFAR 3->64, one image: p 256 KB and y 256 KB move; 3 products of 64 x 4 x 8 = 2048 mma (m16n8k8) each, 85 % of them useful
// columns; shared memory: weights 4096, exchange 2000, images 4000 wavefronts of 128 bytes. At two images per processor
// that is ~11 us of mma and ~12 us of shared memory beside ~33 us of device memory. Every further non-linear step adds
// 4096 mma and one reading of p, from L2 or memory.
#pragma once

#include "core/projection.h"
#include "cuda/fused_fragments.h"

namespace yopo::cuda {

struct FusedArgs {
  UpdateArgs update;
  FusedPlan plan;
  const float* eta_from;  // what this launch's first step reads
  int64_t eta_from_strides[4];
  float* eta_to;
  int64_t eta_to_strides[4];
  bool first;          // this launch's first step is the update's
  int steps;           // of this launch
  Pairs costate_pairs, output_pairs;
  uint32_t out_width_reciprocal;  // ceil(2^32 / OW)
};

template <Compiled kActivation_, class Costate_, bool kPrecise_, int kRow_>
struct FusedTraits {
  static constexpr Compiled kActivation = kActivation_;
  static constexpr bool kAffine = kActivation == Compiled::kIdentity, kPrecise = kPrecise_;
  static constexpr TuningRow kRow = kTuningTable[kRow_];
  static constexpr int kTiles = kRow.tiles, kResultTiles = kRow.result_tiles;
  static constexpr int kChunk = 8;  // k-steps of 8 kernels whose costates are loaded together
  using Costate = Costate_;
};

template <class V>
struct FusedBlock {
  static constexpr bool kPrecise = V::kPrecise;
  static constexpr TuningRow kRow = V::kRow;
  static constexpr int kTiles = V::kTiles, kResultTiles = V::kResultTiles;
  using Costate = typename V::Costate;

  const FusedArgs& args;
  const Params& p;
  const FusedPlan& plan;
  float *weight, *bias, *sums, *u, *g, *exchange;
  int* offsets;
  int C, H, W, K, OH, OW, R, S, columns;
  int group, member;  // lane / 4, lane % 4: where this lane sits in a fragment
  // The tile: input rows [y0, y1), output rows [o0, o1), and the image row of u's first row.
  int64_t image;
  int y0, y1, o0, o1, u_top;

  YOPO_DEVICE explicit FusedBlock(const FusedArgs& a)
      : args(a), p(a.update.params), plan(a.plan), C(int(p.channels)), H(int(p.height)), W(int(p.width)), K(int(p.kernels)),
        OH(int(p.out_height)), OW(int(p.out_width)), R(int(p.rows)), S(int(p.cols)), columns(C * R * S),
        group(lane() / 4), member(lane() % 4) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    weight = shared + plan.weight, bias = shared + plan.bias, sums = shared + plan.sums;
    u = shared + plan.u, g = shared + plan.g, exchange = shared + plan.exchange;
    offsets = reinterpret_cast<int*>(shared + plan.offsets);
  }

  YOPO_DEVICE int stride() const { return int(p.stride[0]); }  // the host took equal strides, 1 or 2
  YOPO_DEVICE bool moves() const { return plan.mode != FusedMode::kResults; }
  YOPO_DEVICE bool wants_sums() const { return plan.mode != FusedMode::kMove && args.update.partial.data != nullptr; }
  YOPO_DEVICE bool wants_output() const { return plan.mode != FusedMode::kMove && p.output != nullptr; }
  template <class F>
  YOPO_DEVICE float constant(F which, int c) const { return args.update.constants.template get<float>(which, c); }

  // ---- 1) weights with the affine part folded in, offsets of the columns, empty sums -------------------------------
  YOPO_DEVICE void load_parameters() {
    const float* w = static_cast<const float*>(p.weight);
    const float* scale = static_cast<const float*>(p.scale);
    for (int i = tid(); i < K * kRow.weight_stride(); i += kFusedThreads) {
      const int k = i / kRow.weight_stride(), column = i % kRow.weight_stride();
      const float value = column < columns ? w[k * columns + column] : 0.0f;
      weight[i] = shared_precision<kPrecise>(scale ? value * scale[k] : value);
    }
    for (int k = tid(); k < K; k += kFusedThreads) {
      float value = p.bias ? static_cast<const float*>(p.bias)[k] : 0.0f;
      if (scale) value *= scale[k];
      if (p.shift) value += static_cast<const float*>(p.shift)[k];
      bias[k] = value;
    }
    for (int i = tid(); i < kRow.columns(); i += kFusedThreads) {
      const int c = i / (R * S), r = i / S % R, s = i % S;
      offsets[i] = i < columns ? (c * plan.u_rows + r * int(p.dilation[0])) * plan.u_cols + s * int(p.dilation[1]) : 0;
    }
    if (wants_sums())
      for (int i = tid(); i < K * (columns + 1); i += kFusedThreads) sums[i] = 0.0f;
  }

  YOPO_DEVICE void take_tile(int tile) {
    image = tile / plan.tiles_per_image;
    const int first = tile % plan.tiles_per_image * plan.tile_rows;
    const int extent = (R - 1) * int(p.dilation[0]), pad = int(p.padding[0]);
    if (plan.mode == FusedMode::kResults) {
      y0 = y1 = 0;
      o0 = first, o1 = first + plan.tile_rows < OH ? first + plan.tile_rows : OH;
    } else {
      y0 = first, y1 = first + plan.tile_rows < H ? first + plan.tile_rows : H;
      const int lowest = y0 + pad - extent;
      o0 = lowest > 0 ? (lowest + stride() - 1) / stride() : 0;
      o1 = (y1 - 1 + pad) / stride() + 1;
      o1 = o1 < OH ? o1 : OH;
      if (plan.mode == FusedMode::kResident) o0 = 0, o1 = OH;
    }
    u_top = o0 * stride() - pad;
  }

  YOPO_DEVICE int pixels() const { return o1 > o0 ? (o1 - o0) * OW : 0; }
  YOPO_DEVICE int row_of(int pixel) const { return int(multiply_high(uint32_t(pixel), args.out_width_reciprocal)); }
  YOPO_DEVICE int u_base(int pixel) const {  // of the first column
    const int row = row_of(pixel);
    return (row * plan.u_cols + pixel - row * OW) * stride();
  }

  template <class Bytes>
  YOPO_DEVICE CostateImage<Costate> image_of(Bytes* base, const int64_t (&strides)[4], Pairs pairs) const {
    char* first = const_cast<char*>(static_cast<const char*>(base)) + (image * strides[0] + o0 * strides[2]) * Costate::kBytes;
    return {first, int(strides[1]), int(strides[2]), int(strides[3]), pairs, p.costate_dtype == DType::kFloat16};
  }
  YOPO_DEVICE int costate_offset(const CostateImage<Costate>& costates, int pixel) const {
    const int row = row_of(pixel);
    return row * costates.row_stride + (pixel - row * OW) * costates.col_stride;
  }

  // ---- 2) u, zero outside the image; g empty ------------------------------------------------------------------------
  YOPO_DEVICE float normalised(float v, int c) const {
    if (args.update.constants.present(kMean)) v = (v - constant(kMean, c)) / constant(kStd, c);
    return shared_precision<kPrecise>(v);
  }
  YOPO_DEVICE float load(const void* data, const int64_t (&strides)[4], int c, int y, int x) const {
    return static_cast<const float*>(data)[image * strides[0] + c * strides[1] + y * strides[2] + x * strides[3]];
  }

  YOPO_DEVICE void load_input(bool clamped) {
    const bool border_only = V::kAffine && moves();  // step() writes the rest before anybody reads it
    for (int task = warp(); task < C * plan.u_rows; task += kFusedWarps) {
      const int c = task / plan.u_rows, y = u_top + task % plan.u_rows;
      const float lo = constant(kLo, c), hi = constant(kHi, c);
      for (int column = lane(); column < plan.u_cols; column += 32) {
        const int x = column - int(p.padding[1]);
        float value = 0.0f;
        if (!border_only && y >= 0 && y < H && x >= 0 && x < W) {
          value = load(p.x, p.x_strides, c, y, x) + load(args.eta_from, args.eta_from_strides, c, y, x);
          if (clamped) value = clamp(value, lo, hi);
          value = normalised(value, c);
        }
        u[task * plan.u_cols + column] = value;
      }
    }
    for (int i = tid(); i < C * plan.g_rows * W; i += kFusedThreads) g[i] = 0.0f;
  }

  // ---- 3) T of one band of pixels: 16 per warp ----------------------------------------------------------------------
  YOPO_DEVICE void multiply_band(const CostateImage<Costate>& costates, int begin, int end, float* to) const {
    for (int local = warp() * 16; local < kRow.band_pixels; local += kFusedWarps * 16) {
      if (begin + local >= end) break;
      const int pixel = begin + local + 2 * group;  // this lane's two rows of the fragment are neighbours
      const bool valid0 = pixel < end, valid1 = pixel + 1 < end;
      const int offset0 = valid0 ? costate_offset(costates, pixel) : 0;
      const int offset1 = valid1 ? costate_offset(costates, pixel + 1) : 0;
      const int base0 = V::kAffine || !valid0 ? 0 : u_base(pixel), base1 = V::kAffine || !valid1 ? 0 : u_base(pixel + 1);
      float t[kTiles][4] = {};
      for (int k0 = 0; k0 < K; k0 += V::kChunk * 8) {
        float q[V::kChunk][2][2];  // [pixel][kernel], kernels 2 * member and the next of every k-step
#pragma unroll
        for (int step = 0; step < V::kChunk; ++step) {
          const int k = k0 + step * 8;
          costates.load_block(q[step], offset0, offset1, valid0 && k < K, valid1 && k < K, k + 2 * member);
        }
#pragma unroll
        for (int step = 0; step < V::kChunk; ++step) {
          const int k = k0 + step * 8;
          if (k >= K) break;
          if constexpr (!V::kAffine) multiply_by_slope(q[step], base0, base1, k);
          Operand<kPrecise, 4> a;  // rows: pixels; columns member, member + 4: kernels 2 * member, 2 * member + 1
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
        float* at = to + column * kRow.band_stride() + local + 2 * group;
        if (column < columns) store_pair(at, t[tile][0], t[tile][2]);
        if (column + 1 < columns) store_pair(at + kRow.band_stride(), t[tile][1], t[tile][3]);
      }
    }
  }

  // q *= act'(z) for kernels k + 2 * member, + 1
  YOPO_DEVICE void multiply_by_slope(float (&q)[2][2], int base0, int base1, int k) const {
    const float bias0 = bias[k + 2 * member], bias1 = bias[k + 2 * member + 1];
    float z[4] = {bias0, bias1, bias0, bias1};
    const float* w = weight + (k + group) * kRow.weight_stride() + member;
#pragma unroll
    for (int step = 0; step < kTiles; ++step) {
      const int near = offsets[step * 8 + member], far = offsets[step * 8 + member + 4];
      Operand<kPrecise, 4> a;
      a.set_rounded(0, u[base0 + near]), a.set_rounded(1, u[base1 + near]);
      a.set_rounded(2, u[base0 + far]), a.set_rounded(3, u[base1 + far]);
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

  // ---- 4) g += what the band's pixels send to every input element; one thread owns an element -----------------------
  YOPO_DEVICE void gather_band(int begin, int end, const float* from) const {
    const int log_stride = stride() - 1, odd = stride() - 1;  // strides 1 and 2
    const int dilation_h = int(p.dilation[0]), dilation_w = int(p.dilation[1]);
    const int pad_h = int(p.padding[0]), pad_w = int(p.padding[1]);
    int low = (o0 + row_of(begin)) * stride() - pad_h, high = (o0 + row_of(end - 1)) * stride() - pad_h + (R - 1) * dilation_h + 1;
    low = low > y0 ? low : y0;
    high = high < y1 ? high : y1;
    const int rows = high - low;
    for (int task = warp(); task < C * rows; task += kFusedWarps) {
      const int c = task / rows, y = low + task % rows;
      float* g_row = g + (c * plan.g_rows + y - y0) * W;
      for (int x = lane(); x < W; x += 32) {
        float sum = 0.0f;
        for (int r = 0; r < R; ++r) {
          const int ty = y + pad_h - r * dilation_h, oy = ty >> log_stride;
          if (ty < 0 || (ty & odd) != 0 || oy < o0 || oy >= o1) continue;
          const int row = (oy - o0) * OW - begin;
          if (row + OW <= 0 || row >= end - begin) continue;
          const float* column = from + (c * R + r) * S * kRow.band_stride();
          for (int s = 0; s < S; ++s) {
            const int tx = x + pad_w - s * dilation_w, ox = tx >> log_stride;
            const unsigned local = unsigned(row + ox);
            if (tx >= 0 && (tx & odd) == 0 && ox < OW && local < unsigned(end - begin)) sum += column[s * kRow.band_stride() + local];
          }
        }
        g_row[x] += sum;
      }
    }
  }

  YOPO_DEVICE void accumulate_gradient() {
    const CostateImage<Costate> costates = image_of(p.costate, p.costate_strides, args.costate_pairs);
    const int count = pixels();
    const int buffer = round_up(columns * kRow.band_stride(), 32);
    int band = 0;
    for (int begin = 0; begin < count; begin += kRow.band_pixels, ++band) {
      const int end = begin + kRow.band_pixels < count ? begin + kRow.band_pixels : count;
      float* to = exchange + band % kRow.band_buffers * buffer;
      multiply_band(costates, begin, end, to);
      sync<20>();  // T is complete
      gather_band(begin, end, to);
      if (kRow.band_buffers == 1 && end < count) sync<21>();  // T may be overwritten
    }
    sync<22>();  // g is complete
  }

  // ---- 5) the projected step; u follows eta -------------------------------------------------------------------------
  YOPO_DEVICE void step(bool first, bool last) {
    const bool keeps_input = plan.mode == FusedMode::kResident && plan.u_rows > 0;
    const int rows = y1 - y0;
    for (int task = warp(); task < C * rows; task += kFusedWarps) {  // the same elements for the same thread in every step
      const int c = task / rows, y = y0 + task % rows;
      const float eps = constant(kEps, c), lo = constant(kLo, c), hi = constant(kHi, c), sigma = constant(kStepSize, c);
      const float divisor = args.update.constants.present(kStd) ? constant(kStd, c) : 1.0f;
      for (int column = lane(); column < W; column += 32) {
        float& sum = g[(c * plan.g_rows + y - y0) * W + column];
        const float gradient = sum / divisor, x = load(p.x, p.x_strides, c, y, column);
        sum = 0.0f;
        float& target = args.eta_to[image * args.eta_to_strides[0] + c * args.eta_to_strides[1] + y * args.eta_to_strides[2] +
                                    column * args.eta_to_strides[3]];
        float eta = first ? load(args.eta_from, args.eta_from_strides, c, y, column) : target;
        const Interval<float> i = admissible_interval(x, eps, lo, hi);
        const bool masks = first && args.first;
        if constexpr (V::kAffine) {
          eta = linf_steps(eta, gradient, i, sigma, args.steps);
        } else if (args.steps > 0) {
          eta = project(eta + signed_step(masks ? masked(gradient, eta, i.lower, i.upper) : gradient, sigma), i.a, i.b);
        }
        target = eta;
        const int u_row = y - u_top, u_col = column + int(p.padding[1]);
        if (keeps_input && u_row >= 0 && u_row < plan.u_rows && u_col < plan.u_cols) {
          const float value = x + eta;
          u[(c * plan.u_rows + u_row) * plan.u_cols + u_col] = normalised(last ? value : clamp(value, lo, hi), c);
        }
      }
    }
  }

  // ---- 6) y = act(z) and D at eta', 16 pixels per warp at a time ----------------------------------------------------
  YOPO_DEVICE void results() {
    const CostateImage<Costate> costates = image_of(p.costate, p.costate_strides, args.costate_pairs);
    const CostateImage<Costate> outputs = image_of(p.output, p.output_strides, args.output_pairs);
    const int count = pixels(), slice = 16 * kResultTiles, slices = (K + slice - 1) / slice;
    const int together = slices < kFusedWarps ? slices : kFusedWarps, members = kFusedWarps / together;
    for (int first = 0; first < slices; first += together) {
      const int mine = first + warp() % together, order = warp() / together;  // which kernels, which share of the pixels
      const bool works = mine < slices && order < members;
      float d[kResultTiles][kTiles][4] = {};
      if (works)
        for (int pixel = order * 16; pixel < count; pixel += members * 16)
          results_of_tile(costates, outputs, pixel, count, mine * slice, d);
      if (!wants_sums()) continue;
      for (int turn = 0; turn < members; ++turn) {  // a fixed order of addition
        if (works && turn == order) add_sums(mine * slice, d);
        sync<23>();
      }
    }
  }

  YOPO_DEVICE void results_of_tile(const CostateImage<Costate>& costates, const CostateImage<Costate>& outputs, int pixel,
                                   int count, int k0, float (&d)[kResultTiles][kTiles][4]) const {
    // Rows of a fragment: kernels 2 * group, + 1 of each m-tile. Columns: pixels 2 * member, + 1 of each n-tile.
    float q[2][kResultTiles][2][2];  // [n-tile][m-tile][pixel][kernel]
    float z[2][kResultTiles][4];     // (k, px) (k, px + 1) (k + 1, px) (k + 1, px + 1)
    int at[2][2], base[2], offset[2][2];
    bool valid[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        at[n][i] = pixel + n * 8 + 2 * member + i;
        valid[n][i] = at[n][i] < count;
        offset[n][i] = valid[n][i] ? costate_offset(costates, at[n][i]) : 0;
      }
      base[n] = pixel + n * 8 + group < count ? u_base(pixel + n * 8 + group) : 0;
    }
    if (wants_sums()) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int m = 0; m < kResultTiles; ++m) {
          const bool inside = k0 + m * 16 < K;
          costates.load_block(q[n][m], offset[n][0], offset[n][1], valid[n][0] && inside, valid[n][1] && inside,
                              k0 + m * 16 + 2 * group);
        }
    }
    if (!V::kAffine || wants_output()) {
      compute_z(z, base, k0);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int m = 0; m < kResultTiles; ++m) {
          if (k0 + m * 16 >= K) continue;
          const float slope = float(p.negative_slope);
          if (wants_output()) {
            float y[2][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) y[i % 2][i / 2] = value_of<V::kActivation>(p.activation, z[n][m][i], slope);
            outputs.store_block(y, costate_offset(outputs, at[n][0]), costate_offset(outputs, at[n][1]), valid[n][0],
                                valid[n][1], k0 + m * 16 + 2 * group);
          }
          if (!V::kAffine && wants_sums()) {
#pragma unroll
            for (int i = 0; i < 4; ++i) q[n][m][i % 2][i / 2] *= slope_of<V::kActivation>(p.activation, z[n][m][i], slope);
          }
        }
    }
    if (wants_sums()) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int base0 = valid[n][0] ? u_base(at[n][0]) : 0, base1 = valid[n][1] ? u_base(at[n][1]) : 0;
        Operand<kPrecise, 4> a[kResultTiles];  // columns member, member + 4: pixels 2 * member, 2 * member + 1
#pragma unroll
        for (int m = 0; m < kResultTiles; ++m) {
          a[m].set(0, q[n][m][0][0]), a[m].set(1, q[n][m][0][1]), a[m].set(2, q[n][m][1][0]), a[m].set(3, q[n][m][1][1]);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const int column = tile * 8 + group, near = offsets[column];
          Operand<kPrecise, 2> b;
          b.set_rounded(0, column == columns ? 1.0f : u[base0 + near]);  // the last column sums q itself
          b.set_rounded(1, column == columns ? 1.0f : u[base1 + near]);
#pragma unroll
          for (int m = 0; m < kResultTiles; ++m)
            if (k0 + m * 16 < K) multiply_add<kPrecise>(d[m][tile], a[m], b);
        }
      }
    }
  }

  // z of 16 * kResultTiles kernels at 16 pixels; base: of pixel `group` of either n-tile
  YOPO_DEVICE void compute_z(float (&z)[2][kResultTiles][4], const int (&base)[2], int k0) const {
#pragma unroll
    for (int m = 0; m < kResultTiles; ++m) {
      const int k = k0 + m * 16 + 2 * group;
      const float bias0 = k < K ? bias[k] : 0.0f, bias1 = k < K ? bias[k + 1] : 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) z[n][m][0] = z[n][m][1] = bias0, z[n][m][2] = z[n][m][3] = bias1;
    }
#pragma unroll
    for (int step = 0; step < kTiles; ++step) {
      const int near = offsets[step * 8 + member], far = offsets[step * 8 + member + 4];
      Operand<kPrecise, 2> b[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) b[n].set_rounded(0, u[base[n] + near]), b[n].set_rounded(1, u[base[n] + far]);
#pragma unroll
      for (int m = 0; m < kResultTiles; ++m) {
        const int k = k0 + m * 16;
        if (k >= K) break;
        const float* w = weight + (k + 2 * group) * kRow.weight_stride() + step * 8 + member;
        Operand<kPrecise, 4> a;
        a.set_rounded(0, w[0]), a.set_rounded(1, w[kRow.weight_stride()]);
        a.set_rounded(2, w[4]), a.set_rounded(3, w[kRow.weight_stride() + 4]);
#pragma unroll
        for (int n = 0; n < 2; ++n) multiply_add<kPrecise>(z[n][m], a, b[n]);
      }
    }
  }

  YOPO_DEVICE void add_sums(int k0, const float (&d)[kResultTiles][kTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kResultTiles; ++m) {
      if (k0 + m * 16 >= K) break;
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

  YOPO_DEVICE void run() {
    load_parameters();
    const int tiles = int(p.batch) * plan.tiles_per_image;
    for (int tile = block(); tile < tiles; tile += blocks()) {
      take_tile(tile);
      // A resident image with nothing to move still copies eta: one pass through step() without steps.
      const bool looping = plan.mode == FusedMode::kResident && !V::kAffine;
      if (plan.u_rows > 0 || plan.g_rows > 0) load_input(moves());
      sync<24>();  // parameters, u and an empty g
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
      for (int i = tid(); i < K * (columns + 1); i += kFusedThreads) partial[i] = sums[i];
    }
  }
};

template <class V>
__global__ void __launch_bounds__(kFusedThreads, V::kRow.blocks_per_processor)
    fused_kernel(const __grid_constant__ FusedArgs args) {
  FusedBlock<V>(args).run();
}

}  // namespace yopo::cuda
