// The general kernel: any convolution geometry, activation, dtype, layout and norm, one image per block at a time.
//
// Nothing is staged in shared memory, so nothing is too large for it: q = p * act'(z) and (for L2) g live in the
// workspace, eta in its output. It is what the fast variants are tested against, and what runs where none of them fits.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/projection.h"
#include "cuda/any_activation.h"
#include "cuda/args.h"
#include "cuda/block_reduce.h"
#include "cuda/costate.h"

namespace yopo::cuda {

constexpr int kGeneralThreads = 256;
constexpr int kGeneralSharedBytes = kGeneralThreads / 32 * int(sizeof(double));

// One image as the block sees it: sizes as ints, memory through strides.
template <class T>
struct GeneralImage {
  const UpdateArgs& args;
  const Params& p;
  int64_t image;
  int H, W, OH, OW, R, S, C, K, group_channels, group_kernels;
  T* q;  // of this block
  T* g;
  bool clamp_input;  // u = clamp(x + eta, lo, hi): with `mask_start`, while eta moves

  YOPO_DEVICE GeneralImage(const UpdateArgs& a)
      : args(a),
        p(a.params),
        image(0),
        H(int(p.height)),
        W(int(p.width)),
        OH(int(p.out_height)),
        OW(int(p.out_width)),
        R(int(p.rows)),
        S(int(p.cols)),
        C(int(p.channels)),
        K(int(p.kernels)),
        group_channels(int(p.channels / p.groups)),
        group_kernels(int(p.kernels / p.groups)),
        q(a.costate_scratch ? static_cast<T*>(a.costate_scratch) + block() * p.kernels * OH * OW : nullptr),
        g(a.gradient_scratch ? static_cast<T*>(a.gradient_scratch) + block() * p.channels * H * W : nullptr),
        clamp_input(false) {}

  YOPO_DEVICE int64_t at(const int64_t (&strides)[4], int c, int y, int x) const {
    return image * strides[0] + c * strides[1] + y * strides[2] + x * strides[3];
  }
  YOPO_DEVICE T x_at(int c, int y, int x) const { return static_cast<const T*>(p.x)[at(p.x_strides, c, y, x)]; }
  YOPO_DEVICE T eta_in(int c, int y, int x) const { return static_cast<const T*>(p.eta)[at(p.eta_strides, c, y, x)]; }
  YOPO_DEVICE T& eta(int c, int y, int x) const { return static_cast<T*>(p.eta_out)[at(p.eta_out_strides, c, y, x)]; }
  YOPO_DEVICE T parameter(const void* values, int i) const { return static_cast<const T*>(values)[i]; }
  // One image's q, typed: the costate itself where f0 is affine, else the workspace's.
  template <class Element>
  struct Costates {
    const Element* first;
    int64_t kernel_stride, row_stride, col_stride;
    YOPO_DEVICE const Element* at(int k, int oy, int ox) const {
      return first + (k * kernel_stride + oy * row_stride + ox * col_stride);
    }
  };
  // f(the costates p), and f(q)
  template <class F>
  YOPO_DEVICE void with_costates(F&& f) const {
    with_dtype(p.costate, p.costate_dtype, [&](auto* data) {
      const int64_t (&s)[4] = p.costate_strides;
      f(Costates<std::remove_const_t<std::remove_pointer_t<decltype(data)>>>{data + image * s[0], s[1], s[2], s[3]});
    });
  }
  template <class F>
  YOPO_DEVICE void with_q(F&& f) const {
    if (p.affine()) return with_costates(f);
    f(Costates<T>{q, int64_t(OH) * OW, OW, 1});
  }
  YOPO_DEVICE Interval<T> interval(int c, int y, int x, T eps) const {
    return admissible_interval(x_at(c, y, x), eps, args.constants.get<T>(kLo, c), args.constants.get<T>(kHi, c));
  }

  // The normalised input at x + eta; both as they lie.
  YOPO_DEVICE T u(T x, T eta, int c) const {
    T v = x + eta;
    if (clamp_input) v = clamp(v, args.constants.get<T>(kLo, c), args.constants.get<T>(kHi, c));
    if (args.constants.present(kMean)) v = (v - args.constants.get<T>(kMean, c)) / args.constants.get<T>(kStd, c);
    return v;
  }

  // A row of the input, for pointers that walk along it.
  struct Row {
    const T *x, *eta;
    int64_t x_stride, eta_stride;
  };
  YOPO_DEVICE Row row(int c, int y) const {
    return {static_cast<const T*>(p.x) + at(p.x_strides, c, y, 0),
            static_cast<const T*>(p.eta_out) + at(p.eta_out_strides, c, y, 0), p.x_strides[3], p.eta_out_strides[3]};
  }

  // scale * conv2d(u) + shift
  YOPO_DEVICE T preactivation(int k, int oy, int ox) const {
    const int first = k / group_kernels * group_channels;
    const int y0 = int(oy * p.stride[0] - p.padding[0]), x0 = int(ox * p.stride[1] - p.padding[1]);
    const int step = int(p.dilation[1]);
    const T* weights = static_cast<const T*>(p.weight) + int64_t(k) * group_channels * R * S;
    T z = T(0);
    for (int c = 0; c < group_channels; ++c)
      for (int r = 0; r < R; ++r) {
        const int y = y0 + r * int(p.dilation[0]);
        if (y < 0 || y >= H) continue;
        const Row in = row(first + c, y);
        const T* w = weights + (c * R + r) * S;
        for (int s = 0, x = x0; s < S; ++s, x += step)
          if (x >= 0 && x < W) z += w[s] * u(in.x[x * in.x_stride], in.eta[x * in.eta_stride], first + c);
      }
    if (p.bias) z += parameter(p.bias, k);
    if (p.scale) z *= parameter(p.scale, k);
    if (p.shift) z += parameter(p.shift, k);
    return z;
  }

  // d<p, f0(u)> / du at one element: taps outside, kernels inside, so that a position is found once and not per kernel.
  template <class Q>
  YOPO_DEVICE T gradient(const Q& costates, int c, int y, int x) const {
    const int k0 = c / group_channels * group_kernels, in = c % group_channels;
    const int64_t next_weight = int64_t(group_channels) * R * S;
    const T* weights = static_cast<const T*>(p.weight) + k0 * next_weight + int64_t(in) * R * S;
    const T* scale = p.scale ? static_cast<const T*>(p.scale) + k0 : nullptr;
    T sum = T(0);
    for (int r = 0; r < R; ++r) {
      const int ty = int(y + p.padding[0] - r * p.dilation[0]), oy = ty / int(p.stride[0]);
      if (ty < 0 || oy * p.stride[0] != ty || oy >= OH) continue;
      for (int s = 0; s < S; ++s) {
        const int tx = int(x + p.padding[1] - s * p.dilation[1]), ox = tx / int(p.stride[1]);
        if (tx < 0 || ox * p.stride[1] != tx || ox >= OW) continue;
        auto* q = costates.at(k0, oy, ox);
        const T* w = weights + r * S + s;
        T part = T(0);
        if (scale != nullptr) {
          for (int k = 0; k < group_kernels; ++k, q += costates.kernel_stride, w += next_weight)
            part += T(load_element(q)) * (*w * scale[k]);
        } else {
          for (int k = 0; k < group_kernels; ++k, q += costates.kernel_stride, w += next_weight)
            part += T(load_element(q)) * *w;
        }
        sum += part;
      }
    }
    return args.constants.present(kStd) ? sum / args.constants.get<T>(kStd, c) : sum;
  }

  // f(c, y, x) for every element of the input; a thread meets the same elements every time.
  template <class F>
  YOPO_DEVICE void for_inputs(F&& f) const {
    const int64_t count = int64_t(C) * H * W;
    for (int64_t i = tid(); i < count; i += size()) f(int(i / (int64_t(H) * W)), int(i / W % H), int(i % W), i);
  }
  template <class F>
  YOPO_DEVICE void for_outputs(F&& f) const {
    const int64_t count = int64_t(K) * OH * OW;
    for (int64_t i = tid(); i < count; i += size()) f(int(i / (int64_t(OH) * OW)), int(i / OW % OH), int(i % OW), i);
  }

  // q = p * act'(z), everywhere; optionally y = act(z)
  YOPO_DEVICE void run_forward(bool want_q, bool want_output) const {
    with_costates([&](const auto& costates) {
      for_outputs([&](int k, int oy, int ox, int64_t i) {
        const T z = preactivation(k, oy, ox), slope = T(p.negative_slope);
        if (want_output)
          store_as<T>(p.output, p.costate_dtype, at(p.output_strides, k, oy, ox),
                      activation_value(p.activation, z, slope));
        if (want_q) q[i] = T(load_element(costates.at(k, oy, ox))) * activation_slope(p.activation, z, slope);
      });
    });
  }

  // g, everywhere
  YOPO_DEVICE void run_gradient() const {
    with_q([&](const auto& costates) {
      for_inputs([&](int c, int y, int x, int64_t i) { g[i] = gradient(costates, c, y, x); });
    });
  }

  // One L-inf step, or for an affine f0 all of them; kMask: the first is masked.
  template <bool kMask>
  YOPO_DEVICE void step_linf(long steps) const {
    with_q([&](const auto& costates) {
      for_inputs([&](int c, int y, int x, int64_t) {
        const T sigma = args.constants.get<T>(kStepSize, c);
        const Interval<T> i = interval(c, y, x, args.constants.get<T>(kEps, c));
        const T grad = gradient(costates, c, y, x);
        eta(c, y, x) = linf_steps<kMask>(eta(c, y, x), grad, i, sigma, steps);
      });
    });
  }

  // The largest magnitude of value(i), and the norm divided by it: neither overflows for any scale.
  template <class F>
  YOPO_DEVICE void scaled_norm(F&& value, T* scratch, T& largest, T& scaled) const {
    T mine = T(0);
    for_inputs([&](int c, int y, int x, int64_t i) { mine = Largest::combine(std::abs(value(c, y, x, i)), mine); });
    largest = block_reduce<Largest>(mine, scratch);
    const T divisor = largest > T(0) ? largest : T(1);
    T sum = T(0);
    for_inputs([&](int c, int y, int x, int64_t i) {
      const T v = value(c, y, x, i) / divisor;
      sum += v * v;
    });
    scaled = std::sqrt(block_reduce<Sum>(sum, scratch));
  }

  // A norm as `scaled_norm` returns it.
  struct Norms {
    T largest, scaled;
  };

  // One L2 step along the gradient in g, whose norm is `norms`, or is computed into it if `fresh`. kMask: g is masked.
  // Only the owner of an element touches it, so no barrier is needed in between.
  template <bool kMask>
  YOPO_DEVICE void step_l2(bool fresh, Norms& norms, T* scratch) const {
    auto direction = [&](int c, int y, int x, int64_t i) {
      if constexpr (!kMask) return g[i];
      const Interval<T> box = interval(c, y, x, T(INFINITY));
      return masked(g[i], eta_in(c, y, x), box.lower, box.upper);
    };
    if (fresh) scaled_norm(direction, scratch, norms.largest, norms.scaled);
    const bool usable = norms.largest > T(0) && norms.largest - norms.largest == T(0);
    for_inputs([&](int c, int y, int x, int64_t i) {
      const T unit = usable ? direction(c, y, x, i) / norms.largest / norms.scaled : T(0);
      const T moved = eta(c, y, x) + args.constants.get<T>(kStepSize, c) * unit;
      eta(c, y, x) = moved == moved ? moved : T(0);
    });
    auto moved = [&](int c, int y, int x, int64_t) { return eta(c, y, x); };
    T largest, scaled;
    scaled_norm(moved, scratch, largest, scaled);
    for_inputs([&](int c, int y, int x, int64_t) {
      const T eps = args.constants.get<T>(kEps, c), norm = largest * scaled;
      const Interval<T> box = interval(c, y, x, T(INFINITY));
      const T shrunk = eta(c, y, x) * (norm > eps ? eps / norm : T(1));
      const T above = shrunk > box.lower ? shrunk : box.lower;
      eta(c, y, x) = above < box.upper ? above : box.upper;
    });
  }

  // D += sum q * u and sum q, one entry per thread; rows are summed apart, for accuracy.
  YOPO_DEVICE void add_partial_sums(bool first_image) const {
    const int columns = args.partial.columns;
    T* partial = static_cast<T*>(args.partial.data) + block() * int64_t(K) * (columns + 1);
    with_q([&](const auto& costates) {
      for (int64_t i = tid(); i < int64_t(K) * (columns + 1); i += size()) {
        const int k = int(i / (columns + 1)), column = int(i % (columns + 1));
        T sum = first_image ? T(0) : partial[i];
        for (int oy = 0; oy < OH; ++oy) sum += sum_of_row(costates, k, column, oy);
        partial[i] = sum;
      }
    });
  }

  // sum q * u over a row of outputs; the last column sums q itself
  template <class Q>
  YOPO_DEVICE T sum_of_row(const Q& costates, int k, int column, int oy) const {
    T sum = T(0);
    auto* value = costates.at(k, oy, 0);
    if (column == args.partial.columns) {
      for (int ox = 0; ox < OW; ++ox, value += costates.col_stride) sum += T(load_element(value));
      return sum;
    }
    const int c = k / group_kernels * group_channels + column / (R * S), r = column / S % R, s = column % S;
    const int y = int(oy * p.stride[0] - p.padding[0] + r * p.dilation[0]), step = int(p.stride[1]);
    if (y < 0 || y >= H) return sum;
    const Row in = row(c, y);
    for (int ox = 0, x = int(s * p.dilation[1] - p.padding[1]); ox < OW; ++ox, x += step, value += costates.col_stride)
      if (x >= 0 && x < W) sum += T(load_element(value)) * u(in.x[x * in.x_stride], in.eta[x * in.eta_stride], c);
    return sum;
  }
};

template <class T>
__global__ void __launch_bounds__(kGeneralThreads) general_kernel(const __grid_constant__ UpdateArgs args) {
  T* scratch = reinterpret_cast<T*>(shared_memory());
  GeneralImage<T> image(args);
  const Params& p = args.params;
  for (int64_t b = block(); b < p.batch; b += blocks()) {
    image.image = b;
    image.clamp_input = p.mask_start;
    // 1) eta' starts as eta
    image.for_inputs([&](int c, int y, int x, int64_t) { image.eta(c, y, x) = image.eta_in(c, y, x); });
    sync<3>();
    // 2) the inner steps
    if (p.norm == Norm::kLinf && p.affine()) {
      p.mask_start ? image.template step_linf<true>(long(p.steps)) : image.template step_linf<false>(long(p.steps));
      sync<6>();  // eta' is complete
    } else {
      typename GeneralImage<T>::Norms norms{};  // of g; an affine f0's serves every step but a masked one
      for (int64_t step = 0; step < p.steps; ++step) {
        if (!p.affine()) {
          image.run_forward(true, false);
          sync<4>();  // q is complete
        }
        const bool masks = p.mask_start && step == 0;
        if (p.norm == Norm::kLinf) {
          masks ? image.template step_linf<true>(1) : image.template step_linf<false>(1);
        } else {
          if (step == 0 || !p.affine()) image.run_gradient();
          if (masks) {
            image.template step_l2<true>(true, norms, scratch);
          } else {
            image.template step_l2<false>(!p.affine() || step == (p.mask_start ? 1 : 0), norms, scratch);
          }
        }
        sync<5>();  // eta' is complete, q may be overwritten
      }
    }
    // 3) the output and q at eta'
    image.clamp_input = false;
    const bool want_sums = args.partial.data != nullptr, want_q = want_sums && !p.affine();
    if (p.output != nullptr || want_q) image.run_forward(want_q, p.output != nullptr);
    sync<7>();
    // 4) sums for the weight gradients
    if (want_sums) image.add_partial_sums(b == block());
    // q is overwritten only behind the next image's first barrier
  }
}

}  // namespace yopo::cuda
