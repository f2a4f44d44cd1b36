// Layer 1, CPU. The first-layer update of one image, in numbered phases, and the reduction of the weight gradients.
#pragma once

#include "core/activations.h"
#include "cpu/layout.h"
#include "cpu/microkernels.h"
#include "cpu/planes.h"
#include "cpu/steps.h"
#include "cpu/vector_math.h"

namespace yopo::YOPO_ISA {

template <class T>
class Update {
 public:
  Update(const Params& params, const Geometry& geometry, Arena& arena)
      : p_(params), geometry_(geometry), l_(params, geometry), weights_(params, l_, arena) {
    partial_stride_ = p_.grad_weight != nullptr ? p_.kernels * (l_.products + 1) : 0;
    partials_ = arena.take<double>(tasks() * partial_stride_);
  }

  void prepare() { weights_.fill(p_, geometry_, l_); }

  int64_t tasks() const { return ceil_div(p_.batch, images_per_task(p_.batch)); }

  size_t scratch_bytes() const {
    Arena counter(nullptr);
    ImagePlanes<T> planes(p_, geometry_, l_, counter);
    return counter.used() + 64;
  }

  // One task: a few images, then their weight gradients with the lanes summed.
  void run(int64_t begin, int64_t end, void* scratch) const {
    Arena arena(scratch);
    ImagePlanes<T> planes(p_, geometry_, l_, arena);
    planes.clear();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t per_task = images_per_task(p_.batch), first = task * per_task;
      for (int64_t image = first; image < first + per_task && image < p_.batch; ++image) run_image(image, planes);
      if (partial_stride_ > 0) reduce_lanes(planes, partials_ + task * partial_stride_);
    }
  }

  // After all tasks: the sum over tasks, in their order, in double.
  void finish() const {
    if (p_.grad_weight == nullptr) return;
    const T *weight = static_cast<const T*>(p_.weight), *scales = static_cast<const T*>(p_.scale);
    const T* biases = static_cast<const T*>(p_.bias);
    for (int64_t k = 0; k < p_.kernels; ++k) {
      const double scale = scales != nullptr ? static_cast<double>(scales[k]) : 1.0;
      const double q_sum = total(p_.kernels * l_.products + k);
      double conv_dot_q = biases != nullptr ? static_cast<double>(biases[k]) * q_sum : 0.0;
      for (int64_t c = 0; c < l_.group_channels; ++c)
        for (int64_t t = 0; t < l_.taps; ++t) {
          const Tap& tap = geometry_.taps[static_cast<size_t>(t)];
          const int64_t to = (k * l_.group_channels + c) * l_.taps + tap.r * p_.cols + tap.s;
          const double sum = total(k * l_.products + c * l_.taps + t);
          static_cast<T*>(p_.grad_weight)[to] = static_cast<T>(sum * scale);
          conv_dot_q += sum * static_cast<double>(weight[to]);
        }
      if (p_.grad_bias != nullptr) static_cast<T*>(p_.grad_bias)[k] = static_cast<T>(q_sum * scale);
      if (p_.grad_scale != nullptr) static_cast<T*>(p_.grad_scale)[k] = static_cast<T>(conv_dot_q);
      if (p_.grad_shift != nullptr) static_cast<T*>(p_.grad_shift)[k] = static_cast<T>(q_sum);
    }
  }

 private:
  void run_image(int64_t image, ImagePlanes<T>& planes) const {
    // 1) Read the image and its perturbation; the costate is read once too, block by block, when a block is first used.
    gather_image(p_, static_cast<const T*>(p_.x) + image * p_.x_strides[0], p_.x_strides, planes.x);
    gather_image(p_, static_cast<const T*>(p_.eta) + image * p_.eta_strides[0], p_.eta_strides, planes.eta);
    CostateReader costate{this, image, planes.costate, false};
    // 2) The inner steps: one gradient for all of them where f0 is affine.
    if (p_.affine() && p_.steps > 0) {
      affine_gradient(planes, costate);
      step(planes, p_.steps, p_.mask_start);
    } else {
      for (int64_t i = 0; i < p_.steps; ++i) {
        set_input(planes, p_.mask_start);
        nonlinear_gradient(planes, costate);
        step(planes, 1, p_.mask_start && i == 0);
      }
    }
    scatter_image(p_, planes.eta, static_cast<T*>(p_.eta_out) + image * p_.eta_out_strides[0], p_.eta_out_strides);
    // 3) Output and weight gradients at the new perturbation.
    if (p_.output == nullptr && p_.grad_weight == nullptr) return;
    set_input(planes, false);
    outputs(image, planes, costate);
  }

  // The costate planes of one image: gathered block by block in the first pass over them, from then on at hand.
  struct CostateReader {
    const Update* update;
    int64_t image;
    T* planes;
    bool complete;

    const T* block(int64_t kernel, int64_t count) const {
      const Params& p = update->p_;
      T* to = planes + kernel * update->l_.costate_plane;
      if (!complete)
        with_costate_type(p.costate_dtype, [&](auto* type) {
          using P = std::remove_pointer_t<decltype(type)>;
          const P* from =
              static_cast<const P*>(p.costate) + image * p.costate_strides[0] + kernel * p.costate_strides[1];
          gather_costate(p, from, p.costate_strides, count, update->geometry_.row_stride, to, update->l_.costate_plane);
        });
      return to;
    }

    // What the block after this one will read, if it lies in one piece of memory.
    Prefetch after(int64_t kernel, int64_t count) const {
      const Params& p = update->p_;
      const int64_t* strides = p.costate_strides;
      const int64_t left = p.kernels - kernel - count, plane = p.out_height * p.out_width;
      if (complete || left <= 0 || strides[3] != 1 || strides[2] != p.out_width || strides[1] != plane) return {};
      const int64_t width = p.costate_dtype == DType::kFloat64 ? 8 : p.costate_dtype == DType::kFloat32 ? 4 : 2;
      const int64_t first = image * strides[0] + (kernel + count) * plane;
      const int64_t turns = update->l_.pixels / (kBlocking.dgrad_accumulators * kLanes<T>)+1;  // tiles of a gradient
      return Prefetch(static_cast<const char*>(p.costate) + first * width,
                      (left < count ? left : count) * plane * width, turns);
    }
  };

  void step(ImagePlanes<T>& planes, int64_t steps, bool mask) const {
    collect_gradient(planes);
    if (p_.norm == Norm::kLinf) {
      linf_steps(p_, planes.x, planes.gradient, steps, mask, planes.eta);
    } else {
      l2_steps(p_, planes.x, planes.gradient, steps, mask, planes.eta, planes.direction);
    }
  }

  // u = norm(x + eta), into the interior of the input planes; clamped to the box for inner steps with `mask_start`.
  void set_input(ImagePlanes<T>& planes, bool clamped) const {
    for (int64_t c = 0; c < p_.channels; ++c) {
      const ChannelThreat<T> threat(p_, c);
      const T mean = p_.mean.present() ? static_cast<T>(p_.mean[c]) : T(0);
      const T std = p_.std.present() ? static_cast<T>(p_.std[c]) : T(1);
      for_each_row(
          c,
          [&](T* row, int64_t from, int64_t step, int64_t count) {
            const T *x = planes.x + from, *eta = planes.eta + from;
            const auto fill = [&](int64_t stride) {
              for (int64_t j = 0; j < count; ++j) {
                const T u = x[j * stride] + eta[j * stride];
                row[j] = ((clamped ? clamp(u, threat.lo, threat.hi) : u) - mean) / std;
              }
            };
            const auto copy = [&](int64_t stride) {  // without normalisation: no division
              for (int64_t j = 0; j < count; ++j) {
                const T u = x[j * stride] + eta[j * stride];
                row[j] = clamped ? clamp(u, threat.lo, threat.hi) : u;
              }
            };
            if (p_.mean.present()) return fill(step);
            step == 1 ? copy(1) : copy(step);
          },
          planes.input);
    }
  }

  void collect_gradient(ImagePlanes<T>& planes) const {
    if (p_.stride[0] > 1 || p_.stride[1] > 1)  // some pixels may be read by no tap
      std::memset(planes.gradient, 0, static_cast<size_t>(l_.pixels) * sizeof(T));
    for (int64_t c = 0; c < p_.channels; ++c) {
      const T std = p_.std.present() ? static_cast<T>(p_.std[c]) : T(1);
      for_each_row(
          c,
          [&](const T* row, int64_t to, int64_t step, int64_t count) {
            T* g = planes.gradient + to;
            if (step == 1 && !p_.std.present()) {
              copy_row(row, g, count);
            } else {
              for (int64_t j = 0; j < count; ++j) g[j * step] = row[j] / std;
            }
          },
          planes.input_gradient);
    }
  }

  // Calls f(row in its plane, index of its first pixel in a dense image, pixel step, count) for every row of channel c.
  template <class F>
  void for_each_row(int64_t c, const F& f, T* plane_base) const {
    for (int64_t i = 0; i < l_.phases; ++i) {
      const Phase& phase = geometry_.phases[static_cast<size_t>(i)];
      const PlaneWindow w = plane_window(p_, geometry_.row_stride, geometry_.plane_rows, phase.a, phase.b);
      T* plane = plane_base + (c * l_.phases + i) * l_.input_plane;
      for (int64_t row = w.row_begin; row < w.row_end && w.col_begin < w.col_end; ++row) {
        const int64_t h = row * p_.stride[0] + phase.a - p_.padding[0];
        const int64_t first = w.col_begin * p_.stride[1] + phase.b - p_.padding[1];
        f(plane + row * geometry_.row_stride + w.col_begin, (c * p_.height + h) * p_.width + first, p_.stride[1],
          w.col_end - w.col_begin);
      }
    }
  }

  void clear_gradient(ImagePlanes<T>& planes) const {
    std::memset(planes.input_gradient, 0, static_cast<size_t>(p_.channels * l_.phases * l_.input_plane) * sizeof(T));
  }

  // Whether rows fill vectors well enough to be worked on one by one (see dgrad_rows).
  bool dense_rows_3x3() const {
    const int64_t padded = round_up(geometry_.row_stride, kLanes<T>);
    return 4 * geometry_.row_stride >= 3 * padded && p_.rows == 3 && p_.cols == 3 && p_.stride[0] == 1 &&
           p_.stride[1] == 1 && p_.dilation[0] == 1 && p_.dilation[1] == 1;
  }

  // Adds the input gradient of `count` costate planes, the first being output channel k of its group.
  void add_gradient(ImagePlanes<T>& planes, int64_t group, int64_t k, const T* costate, int64_t count,
                    Prefetch ahead) const {
    const T* weight = weights_.dgrad + group * l_.group_kernels * l_.products;
    for (int64_t i = 0; i < l_.phases; ++i) {
      const Phase& phase = geometry_.phases[static_cast<size_t>(i)];
      const PlaneWindow w = plane_window(p_, geometry_.row_stride, geometry_.plane_rows, phase.a, phase.b);
      const int64_t taps = phase.tap_end - phase.tap_begin;
      for (int64_t c = 0; c < l_.group_channels; c += kChannelBlock)
        with_width<kChannelBlock>(l_.group_channels - c, [&](auto width) {
          constexpr int kC = decltype(width)::value;
          T* g = planes.input_gradient + ((group * l_.group_channels + c) * l_.phases + i) * l_.input_plane;
          if (kC == 1 && dense_rows_3x3()) {
            dgrad_rows<T>(costate, l_.costate_plane, count, geometry_.row_stride, weight + k * taps, g, w.row_begin,
                          w.row_end, ahead);
          } else {
            dgrad<T, kC>(costate, l_.costate_plane, count, weights_.dgrad_offsets + phase.tap_begin, taps,
                         weight + k * taps * kC, g, l_.phases * l_.input_plane, w.row_begin * geometry_.row_stride,
                         w.row_end * geometry_.row_stride, ahead);
          }
          weight += l_.group_kernels * taps * kC;
        });
    }
  }

  template <class F>
  void for_each_kernel_block(const F& f) const {  // f(group, first output channel in the group, count)
    for (int64_t group = 0; group < p_.groups; ++group)
      for (int64_t k = 0; k < l_.group_kernels; k += l_.kernel_block) {
        const int64_t left = l_.group_kernels - k;
        f(group, k, left < l_.kernel_block ? left : l_.kernel_block);
      }
  }

  void affine_gradient(ImagePlanes<T>& planes, CostateReader& costate) const {
    clear_gradient(planes);
    for_each_kernel_block([&](int64_t group, int64_t k, int64_t count) {
      const int64_t kernel = group * l_.group_kernels + k;
      add_gradient(planes, group, k, costate.block(kernel, count), count, costate.after(kernel, count));
    });
    costate.complete = true;
  }

  // Pre-activations of a block of output channels, to `finish(channel in the block, flat position, vector)`.
  template <class Finish>
  void pre_activations(ImagePlanes<T>& planes, int64_t group, int64_t k, int64_t count, const Finish& finish) const {
    const T* u = planes.input + group * l_.group_channels * l_.phases * l_.input_plane;
    for (int64_t i = 0; i < count; i += kBlocking.forward_kernels)
      with_width<kBlocking.forward_kernels>(count - i, [&](auto width) {
        const int64_t kernel = group * l_.group_kernels + k + i;
        Finish at = finish;
        at.skip(i);
        forward<T, decltype(width)::value>(u, weights_.forward_offsets, l_.products,
                                           weights_.forward + kernel * l_.products, weights_.bias + kernel,
                                           geometry_.out_size, at);
      });
  }

  // planes.masked_costate = p * act'(planes.output), element by element; zeros of the costate stay zeros.
  void mask_costate(ImagePlanes<T>& planes, const T* costate, int64_t count) const {
    const T negative_slope = static_cast<T>(p_.negative_slope);
    const int64_t size = round_up(geometry_.out_size, kLanes<T>);
    dispatch_activation(p_.activation, [&](auto act) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = i * l_.costate_plane;
        mask_row<decltype(act)>(costate + at, planes.output + at, size, negative_slope, planes.masked_costate + at);
      }
    });
  }

  void activate(ImagePlanes<T>& planes, int64_t count) const {
    if (p_.affine()) return;
    const T negative_slope = static_cast<T>(p_.negative_slope);
    dispatch_activation(p_.activation, [&](auto act) {
      for (int64_t i = 0; i < count; ++i) {
        T* z = planes.output + i * l_.costate_plane;
        activate_row<decltype(act)>(z, geometry_.out_size, negative_slope, z);
      }
    });
  }

  void nonlinear_gradient(ImagePlanes<T>& planes, CostateReader& costate) const {
    clear_gradient(planes);
    for_each_kernel_block([&](int64_t group, int64_t k, int64_t count) {
      const int64_t kernel = group * l_.group_kernels + k;
      const T* p = costate.block(kernel, count);
      if (p_.activation == Activation::kRelu) {
        pre_activations(planes, group, k, count, MaskCostateByRelu<T>{p, planes.masked_costate, l_.costate_plane});
      } else {
        pre_activations(planes, group, k, count, StorePreActivation<T>{planes.output, l_.costate_plane});
        mask_costate(planes, p, count);
      }
      add_gradient(planes, group, k, planes.masked_costate, count, costate.after(kernel, count));
    });
    costate.complete = true;
  }

  void outputs(int64_t image, ImagePlanes<T>& planes, CostateReader& reader) const {
    const bool need_output = p_.output != nullptr, need_weights = p_.grad_weight != nullptr;
    const bool mask = need_weights && !p_.affine();
    for_each_kernel_block([&](int64_t group, int64_t k, int64_t count) {
      const int64_t kernel = group * l_.group_kernels + k;
      const T* costate = need_weights ? reader.block(kernel, count) : nullptr;
      // a) Pre-activations of the block, and from them the masked costate and the output.
      if (need_output || mask)
        pre_activations(planes, group, k, count, StorePreActivation<T>{planes.output, l_.costate_plane});
      if (mask) mask_costate(planes, costate, count);
      if (need_output) {
        activate(planes, count);
        with_costate_type(p_.costate_dtype, [&](auto* type) {
          using P = std::remove_pointer_t<decltype(type)>;
          P* to = static_cast<P*>(p_.output) + image * p_.output_strides[0] + kernel * p_.output_strides[1];
          scatter_output(p_, planes.output, l_.costate_plane, count, geometry_.row_stride, to, p_.output_strides);
        });
      }
      // b) Weight gradients while the block is in cache.
      if (need_weights) add_weight_gradient(planes, group, kernel, mask ? planes.masked_costate : costate, count);
    });
  }

  void add_weight_gradient(ImagePlanes<T>& planes, int64_t group, int64_t kernel, const T* q, int64_t count) const {
    const T* u = planes.input + group * l_.group_channels * l_.phases * l_.input_plane;
    const int64_t stride = l_.products * kLanes<T>;
    for (int64_t i = 0; i < count; i += kBlocking.wgrad_kernels)
      with_width<kBlocking.wgrad_kernels>(count - i, [&](auto width) {
        wgrad<T, decltype(width)::value>(q + i * l_.costate_plane, l_.costate_plane, u, weights_.forward_offsets,
                                         l_.products, geometry_.out_size, planes.weight_sums + (kernel + i) * stride,
                                         stride);
      });
    if (p_.grad_bias == nullptr && p_.grad_scale == nullptr && p_.grad_shift == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
      T* sums = planes.costate_sums + (kernel + i) * kLanes<T>;
      const T* from = q + i * l_.costate_plane;
      constexpr int64_t kStep = kLanes<T>, kApart = 4;  // sums apart, to hide the latency of additions
      Vec<T> acc[kApart] = {load(sums)};
      int64_t at = 0;
      for (; at + kApart * kStep <= geometry_.out_size; at += kApart * kStep)
#pragma GCC unroll 4
        for (int64_t j = 0; j < kApart; ++j) acc[j] += load(from + at + j * kStep);
      for (; at < geometry_.out_size; at += kStep) acc[0] += load(from + at);
      store(sums, (acc[0] + acc[1]) + (acc[2] + acc[3]));
    }
  }

  void reduce_lanes(ImagePlanes<T>& planes, double* to) const {
    const int64_t sums = p_.kernels * l_.products;
    for (int64_t i = 0; i < sums; ++i)
      to[i] = static_cast<double>(lane_sum<T>(load(planes.weight_sums + i * kLanes<T>)));
    for (int64_t k = 0; k < p_.kernels; ++k)
      to[sums + k] = static_cast<double>(lane_sum<T>(load(planes.costate_sums + k * kLanes<T>)));
    std::memset(planes.weight_sums, 0, static_cast<size_t>(sums * kLanes<T>) * sizeof(T));
    std::memset(planes.costate_sums, 0, static_cast<size_t>(p_.kernels * kLanes<T>) * sizeof(T));
  }

  double total(int64_t index) const {
    double sum = 0;
    for (int64_t task = 0; task < tasks(); ++task) sum += partials_[task * partial_stride_ + index];
    return sum;
  }

  const Params& p_;
  const Geometry& geometry_;
  Layout<T> l_;
  PackedWeights<T> weights_;
  double* partials_;  // [task][K * products, then K]
  int64_t partial_stride_;
};

}  // namespace yopo::YOPO_ISA
