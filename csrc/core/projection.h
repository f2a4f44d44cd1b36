// Layer 0. The admissible interval and the projected sign step of one element, as every backend computes them.
//
// Comparisons are written so that a NaN never widens the ball: a NaN pixel has the interval [0, 0], a NaN perturbation
// lands on a, sign(NaN) = 0.
#pragma once

#include "core/macros.h"

namespace yopo {

// [lower, upper] keeps x + eta in the box, [a, b] keeps eta in the L-inf ball as well.
template <class T>
struct Interval {
  T lower, upper, a, b;
};

template <class T>
YOPO_HD Interval<T> admissible_interval(T x, T eps, T lo, T hi) {
  const T below = lo - x, above = hi - x;
  Interval<T> i;
  i.lower = below < T(0) ? below : T(0);
  i.upper = above > T(0) ? above : T(0);
  i.a = -eps > i.lower ? -eps : i.lower;
  i.b = eps < i.upper ? eps : i.upper;
  return i;
}

template <class T>
YOPO_HD T clamp(T v, T lo, T hi) {  // keeps a NaN, as torch.clamp does
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

template <class T>
YOPO_HD T project(T eta, T a, T b) {
  eta = eta > a ? eta : a;
  return eta < b ? eta : b;
}

template <class T>
YOPO_HD T signed_step(T g, T step_size) {  // step_size * sign(g)
  return g > T(0) ? step_size : (g < T(0) ? -step_size : T(0));
}

// With `mask_start`, the gradient (or step) of the first step. Later steps need no mask: what `project` returns lies in
// [a, b], so in [lower, upper], without rounding.
template <class T>
YOPO_HD T masked(T g, T eta, T lower, T upper) {
  return (eta < lower || eta > upper) ? T(0) : g;
}

// n L-inf steps along one gradient: what the iteration does when f0 is affine, bit by bit. kMask: the first is masked.
template <bool kMask, class T>
YOPO_HD T linf_steps(T eta, T g, const Interval<T>& i, T step_size, long steps) {
  if (steps == 0) return eta;
  const T s = signed_step(g, step_size);
  eta = project(eta + (kMask ? masked(s, eta, i.lower, i.upper) : s), i.a, i.b);
  for (long k = 1; k < steps; ++k) {
    const T before = eta;
    eta = project(eta + s, i.a, i.b);
    if (eta == before) break;  // at a fixed point of the iteration
  }
  return eta;
}

}  // namespace yopo
