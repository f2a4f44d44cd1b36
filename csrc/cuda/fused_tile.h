// What one block of the fused kernel works on: parameters and a tile of an image in shared memory.
#pragma once

#include "cuda/fused_fragments.h"

namespace yopo::cuda {

struct FusedArgs {
  UpdateArgs update;
  FusedPlan plan;
  const float* eta_from;  // what this launch's first step reads
  int64_t eta_from_strides[4];
  float* eta_to;
  int64_t eta_to_strides[4];
  bool first;  // this launch's first step is the update's
  int steps;   // of this launch
  Pairs costate_pairs, output_pairs;
  uint32_t out_width_reciprocal;  // ceil(2^32 / OW)
};

template <Compiled kActivation_, class Costate_, bool kPrecise_, int kRow_, bool kKnown_>
struct FusedTraits {
  static constexpr bool kKnown = kKnown_;  // the geometry is the row's own
  static constexpr Compiled kActivation = kActivation_;
  static constexpr bool kAffine = kActivation == Compiled::kIdentity, kPrecise = kPrecise_;
  static constexpr TuningRow kRow = kTuningTable[kRow_];
  static constexpr Geometry kGeometry = kKnownGeometry[kRow_];
  static constexpr int kThreads = kRow.threads, kWarps = kRow.warps();
  static constexpr int kTiles = kRow.tiles;
  // Transcendental slopes and threefold products need registers themselves, and the time to hide fewer loads.
  static constexpr bool kHeavy = kActivation == Compiled::kAny || kPrecise;
  static constexpr int kResultTiles = kHeavy ? 1 : kRow.result_tiles;
  static constexpr int kPixelTiles = kPrecise && kTiles > 4 ? 1 : 2;  // n-tiles of 8 pixels whose results come together
  static constexpr int kUnroll = kTiles <= 4 ? kTiles : 2;            // of loops over columns that hold no accumulators
  static constexpr int kChunk = kActivation == Compiled::kAny ? 1 : kPrecise || !kAffine ? kRow.chunk / 2 : kRow.chunk;
  using Costate = Costate_;
  static constexpr bool kExact = Costate::kExact && kActivation != Compiled::kAny;  // q in tf32: slopes are 0 and 1
};

template <class V>
struct FusedTile {
  static constexpr int kThreads = V::kThreads, kWarps = V::kWarps;
  static constexpr bool kPrecise = V::kPrecise, kKnown = V::kKnown;
  static constexpr TuningRow kRow = V::kRow;
  static constexpr Geometry kGeometry = V::kGeometry;
  static constexpr int kTiles = V::kTiles, kResultTiles = V::kResultTiles;
  using Costate = typename V::Costate;

  const FusedArgs& args;
  const Params& p;
  const FusedPlan& plan;
  float *weight, *bias, *constants, *sums, *u, *g, *exchange;
  int* offsets;
  int C, H, W, K, OH, OW, R, S, columns;
  int group, member;  // lane / 4, lane % 4: where this lane sits in a fragment
  // The tile: input rows [y0, y1), output rows [o0, o1), and the image row of u's first row.
  int64_t image;
  int y0, y1, o0, o1, u_top;

  YOPO_DEVICE explicit FusedTile(const FusedArgs& a)
      : args(a),
        p(a.update.params),
        plan(a.plan),
        C(kKnown ? kGeometry.channels : int(p.channels)),
        H(int(p.height)),
        W(int(p.width)),
        K(int(p.kernels)),
        OH(int(p.out_height)),
        OW(int(p.out_width)),
        R(kKnown ? kGeometry.rows : int(p.rows)),
        S(kKnown ? kGeometry.cols : int(p.cols)),
        columns(C * R * S),
        group(lane() / 4),
        member(lane() % 4) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    weight = shared + plan.weight, bias = shared + plan.bias, sums = shared + plan.sums;
    u = shared + plan.u, g = shared + plan.g, exchange = shared + plan.exchange, constants = shared + plan.constants;
    offsets = reinterpret_cast<int*>(shared + plan.offsets);
  }

  // the host took equal strides, 1 or 2
  YOPO_DEVICE int stride() const { return kKnown ? kGeometry.stride : int(p.stride[0]); }
  YOPO_DEVICE int dilation_h() const { return kKnown ? 1 : int(p.dilation[0]); }
  YOPO_DEVICE int dilation_w() const { return kKnown ? 1 : int(p.dilation[1]); }
  YOPO_DEVICE bool moves() const { return plan.mode != FusedMode::kResults; }
  YOPO_DEVICE bool wants_sums() const { return plan.mode != FusedMode::kMove && args.update.partial.data != nullptr; }
  YOPO_DEVICE bool wants_output() const { return plan.mode != FusedMode::kMove && p.output != nullptr; }
  YOPO_DEVICE float constant(Constant which, int c) const { return constants[which * C + c]; }

  // ---- 1) weights with the affine part folded in, offsets of the columns, empty sums ----
  YOPO_DEVICE void load_parameters() {
    const float* w = static_cast<const float*>(p.weight);
    const float* scale = static_cast<const float*>(p.scale);
    for (int i = tid(); i < K * kRow.weight_stride(); i += kThreads) {
      const int k = i / kRow.weight_stride(), column = i % kRow.weight_stride();
      const float value = column < columns ? w[k * columns + column] : 0.0f;
      weight[i] = shared_precision<kPrecise>(scale ? value * scale[k] : value);
    }
    for (int k = tid(); k < K; k += kThreads) {
      float value = p.bias ? static_cast<const float*>(p.bias)[k] : 0.0f;
      if (scale) value *= scale[k];
      if (p.shift) value += static_cast<const float*>(p.shift)[k];
      bias[k] = value;
    }
    for (int i = tid(); i < kRow.columns(); i += kThreads) {
      const int c = i / (R * S), r = i / S % R, s = i % S;
      offsets[i] = i < columns ? (c * plan.u_rows + r * dilation_h()) * plan.u_cols + s * dilation_w() : 0;
    }
    for (int i = tid(); i < kConstants * C; i += kThreads) {
      const Constant which = Constant(i / C);
      constants[i] = args.update.constants.present(which) ? args.update.constants.get<float>(which, i % C) : 0.0f;
    }
    if (wants_sums())
      for (int i = tid(); i < K * (columns + 1); i += kThreads) sums[i] = 0.0f;
  }

  YOPO_DEVICE void take_tile(int tile) {
    image = plan.mode == FusedMode::kResident ? tile : tile / plan.tiles_per_image;
    const int first = int(tile - image * plan.tiles_per_image) * plan.tile_rows;
    const int extent = (R - 1) * dilation_h(), pad = int(p.padding[0]);
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
    char* first =
        const_cast<char*>(static_cast<const char*>(base)) + (image * strides[0] + o0 * strides[2]) * Costate::kBytes;
    return {first, int(strides[1]), int(strides[2]), int(strides[3]), pairs, p.costate_dtype == DType::kFloat16};
  }
  YOPO_DEVICE int costate_offset(const CostateImage<Costate>& costates, int pixel) const {
    const int row = row_of(pixel);
    return row * costates.row_stride + (pixel - row * OW) * costates.col_stride;
  }

  // f(c, row) for `rows` rows of every channel, a warp each; a warp meets the same rows every time. No division.
  template <class F>
  YOPO_DEVICE void for_rows(int rows, F&& f) const {
    int c = 0;
    for (int row = warp(); rows > 0; row += kWarps) {
      while (row >= rows && c < C) row -= rows, ++c;
      if (c >= C) break;
      f(c, row);
    }
  }

  // ---- 2) u, zero outside the image; g empty ----
  YOPO_DEVICE float normalised(float v, int c) const {
    if (args.update.constants.present(kMean)) v = (v - constant(kMean, c)) / constant(kStd, c);
    return shared_precision<kPrecise>(v);
  }

  // The tile's image in an array like x; the host checked that an image's offsets fit an int.
  template <class T>
  struct ImageOf {
    T* first;
    int channel_stride, row_stride, col_stride;
    YOPO_DEVICE T* row(int c, int y) const { return first + (c * channel_stride + y * row_stride); }
  };
  template <class T>
  YOPO_DEVICE ImageOf<T> image_in(T* data, const int64_t (&strides)[4]) const {
    return {data + image * strides[0], int(strides[1]), int(strides[2]), int(strides[3])};
  }

  YOPO_DEVICE void load_input(bool clamped) {
    const ImageOf<const float> xs = image_in(static_cast<const float*>(p.x), p.x_strides);
    const ImageOf<const float> etas = image_in(args.eta_from, args.eta_from_strides);
    const bool border_only = V::kAffine && moves();  // step() writes the rest before anybody reads it
    for_rows(plan.u_rows, [&](int c, int row) {
      const int y = u_top + row;
      const float lo = constant(kLo, c), hi = constant(kHi, c);
      for (int column = lane(); column < plan.u_cols; column += 32) {
        const int x = column - int(p.padding[1]);
        float value = 0.0f;
        if (!border_only && y >= 0 && y < H && x >= 0 && x < W) {
          value = xs.row(c, y)[x * xs.col_stride] + etas.row(c, y)[x * etas.col_stride];
          if (clamped) value = clamp(value, lo, hi);
          value = normalised(value, c);
        }
        u[(c * plan.u_rows + row) * plan.u_cols + column] = value;
      }
    });
    for (int i = tid(); i < C * plan.g_rows * W; i += kThreads) g[i] = 0.0f;
  }
};

}  // namespace yopo::cuda
