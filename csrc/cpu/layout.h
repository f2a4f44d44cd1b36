// Layer 1, CPU. Sizes and places: packed weights (one copy per call) and the planes of one image (one copy per thread).
#pragma once

#include "core/geometry.h"
#include "core/params.h"
#include "cpu/blocking.h"

namespace yopo::YOPO_ISA {

// Hands out 64-byte aligned pieces of a buffer; with a null buffer it only counts.
class Arena {
 public:
  explicit Arena(void* buffer) : base_(static_cast<char*>(buffer)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Sizes that every part agrees on.
template <class T>
struct Layout {
  int64_t group_channels, group_kernels;  // C/groups, K/groups
  int64_t taps;                           // kernel positions
  int64_t products;                       // (channel, tap) pairs of one output channel
  int64_t phases;
  int64_t input_plane;    // elements between two input planes, tail included
  int64_t costate_plane;  // elements between two costate planes: a halo of zeros in front, shared with the one before
  int64_t kernel_block;   // output channels worked on between two passes
  int64_t pixels;         // C * H * W

  Layout(const Params& p, const Geometry& geometry) {
    group_channels = p.channels / p.groups;
    group_kernels = p.kernels / p.groups;
    taps = p.rows * p.cols;
    products = group_channels * taps;
    phases = static_cast<int64_t>(geometry.phases.size());
    input_plane = round_up(geometry.plane_rows * geometry.row_stride + kLanes<T>, kLanes<T>);
    costate_plane = round_up(geometry.halo + geometry.out_size + kLanes<T>, kLanes<T>);
    const int64_t fit = kPlaneBudget / (costate_plane * static_cast<int64_t>(sizeof(T)));
    const int64_t step = kBlocking.forward_kernels;
    kernel_block = fit < 2 * step ? step : fit / step * step;
    // channels_last tensors are read and written a vector of channels at a time
    if (p.costate_strides[1] == 1 && p.out_width >= kLanes<T> && kernel_block < kLanes<T>)
      kernel_block = round_up(kLanes<T>, step);  // blocks begin where packed weights do
    if (kernel_block > group_kernels) kernel_block = group_kernels;
    pixels = p.channels * p.height * p.width;
  }
};

// The weights, scale folded in, in the order the contractions read them.
template <class T>
struct PackedWeights {
  T* dgrad;                  // [group][phase][channel block][k][tap][channel]
  T* forward;                // [group][kernel block of kBlocking][channel][tap][k]
  T* bias;                   // [K]: scale * bias + shift
  int64_t* dgrad_offsets;    // [taps]
  int64_t* forward_offsets;  // [C/groups * taps], from the group's first input plane

  PackedWeights(const Params& p, const Layout<T>& l, Arena& arena)
      : dgrad(arena.take<T>(p.kernels * l.products)),
        forward(arena.take<T>(p.kernels * l.products)),
        bias(arena.take<T>(p.kernels)),
        dgrad_offsets(arena.take<int64_t>(l.taps)),
        forward_offsets(arena.take<int64_t>(l.products)) {}

  void fill(const Params& p, const Geometry& geometry, const Layout<T>& l);
};

inline constexpr int64_t kChannelBlock = 4;  // input channels of one dgrad tile at most

template <class T>
void PackedWeights<T>::fill(const Params& p, const Geometry& geometry, const Layout<T>& l) {
  const T *weight = static_cast<const T*>(p.weight), *scales = static_cast<const T*>(p.scale);
  const T *biases = static_cast<const T*>(p.bias), *shifts = static_cast<const T*>(p.shift);
  for (int64_t k = 0; k < p.kernels; ++k) {
    const T folded = (biases != nullptr ? biases[k] : T(0)) * (scales != nullptr ? scales[k] : T(1));
    bias[k] = folded + (shifts != nullptr ? shifts[k] : T(0));
  }
  for (int64_t t = 0; t < l.taps; ++t) dgrad_offsets[t] = geometry.taps[static_cast<size_t>(t)].offset;
  for (int64_t c = 0, i = 0; c < l.group_channels; ++c)
    for (int64_t t = 0; t < l.taps; ++t, ++i) {
      const Tap& tap = geometry.taps[static_cast<size_t>(t)];
      forward_offsets[i] = (c * l.phases + tap.phase) * l.input_plane + tap.offset;
    }
  const auto folded_weight = [&](int64_t k, int64_t c, int64_t t) {
    const Tap& tap = geometry.taps[static_cast<size_t>(t)];
    const T w = weight[(k * l.group_channels + c) * l.taps + tap.r * p.cols + tap.s];
    return scales != nullptr ? w * scales[k] : w;
  };
  T *d = dgrad, *f = forward;
  for (int64_t group = 0; group < p.groups; ++group) {
    const int64_t k0 = group * l.group_kernels, k1 = k0 + l.group_kernels;
    for (const Phase& phase : geometry.phases)
      for (int64_t c0 = 0; c0 < l.group_channels; c0 += kChannelBlock)
        for (int64_t k = k0; k < k1; ++k)
          for (int64_t t = phase.tap_begin; t < phase.tap_end; ++t)
            for (int64_t c = c0; c < c0 + kChannelBlock && c < l.group_channels; ++c) *d++ = folded_weight(k, c, t);
    for (int64_t q0 = k0; q0 < k1; q0 += kBlocking.forward_kernels)
      for (int64_t c = 0; c < l.group_channels; ++c)
        for (int64_t t = 0; t < l.taps; ++t)
          for (int64_t k = q0; k < q0 + kBlocking.forward_kernels && k < k1; ++k) *f++ = folded_weight(k, c, t);
  }
}

// The planes of one image.
template <class T>
struct ImagePlanes {
  T *x, *eta, *gradient, *direction;  // [C * H * W] dense; direction: L2 only
  T* input;                           // [C][phase] input planes of u
  T* input_gradient;                  // likewise, of g
  T* costate;                         // [K] costate planes
  T* masked_costate;                  // [kernel block]: p * act'
  T* output;                          // [kernel block]
  T* weight_sums;                     // [K][products][lane]
  T* costate_sums;                    // [K][lane]
  T* end;

  ImagePlanes(const Params& p, const Geometry& g, const Layout<T>& l, Arena& arena) {
    x = arena.take<T>(l.pixels);
    eta = arena.take<T>(l.pixels);
    gradient = arena.take<T>(l.pixels);
    direction = arena.take<T>(p.norm == Norm::kL2 ? l.pixels : 0);
    input = arena.take<T>(p.channels * l.phases * l.input_plane + g.halo + kLanes<T>);
    input_gradient = arena.take<T>(p.channels * l.phases * l.input_plane);
    costate = arena.take<T>(p.kernels * l.costate_plane + 2 * g.halo + kLanes<T>) + g.halo;
    masked_costate = arena.take<T>(l.kernel_block * l.costate_plane + 2 * g.halo + kLanes<T>) + g.halo;
    output = arena.take<T>(l.kernel_block * l.costate_plane);
    const bool weights = p.grad_weight != nullptr;
    weight_sums = arena.take<T>(weights ? p.kernels * l.products * kLanes<T> : 0);
    costate_sums = arena.take<T>(weights ? p.kernels * kLanes<T> : 0);
    end = arena.take<T>(0);
  }

  // Zeros for every padding and halo; the images overwrite the rest.
  void clear() { std::memset(x, 0, static_cast<size_t>(reinterpret_cast<char*>(end) - reinterpret_cast<char*>(x))); }
};

}  // namespace yopo::YOPO_ISA
