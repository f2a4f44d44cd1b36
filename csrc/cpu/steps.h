// Layer 1, CPU. The perturbation steps of one image, on dense rows (core/projection.h holds the arithmetic).
#pragma once

#include <cmath>

#include "core/params.h"
#include "core/projection.h"
#include "cpu/planes.h"
#include "cpu/simd.h"

namespace yopo::YOPO_ISA {

// The threat model of one channel, in the compute dtype.
template <class T>
struct ChannelThreat {
  T step_size, eps, lo, hi;

  YOPO_HD ChannelThreat(const Params& p, int64_t c)
      : step_size(static_cast<T>(p.step_size[c])),
        eps(static_cast<T>(p.eps[c])),
        lo(static_cast<T>(p.lo[c])),
        hi(static_cast<T>(p.hi[c])) {}
};

// `steps` projected steps of one vector, in registers. A step that changes nothing will change nothing again, so the
// cost is bounded by the width of the interval, not by `steps`.
template <class T>
YOPO_HD Vec<T> further_steps(Vec<T> eta, Vec<T> step, Vec<T> a, Vec<T> b, int64_t steps) {
  constexpr int64_t kBetweenLooks = 8;
  while (steps > 0) {
    const Vec<T> before = eta;
    for (int64_t k = steps < kBetweenLooks ? steps : kBetweenLooks; k > 0; --k) {
      eta += step;
      eta = eta > a ? eta : a;
      eta = eta < b ? eta : b;
    }
    if (std::memcmp(&before, &eta, sizeof(eta)) == 0) break;
    steps -= kBetweenLooks;
  }
  return eta;
}

// `steps` L-inf steps along a fixed gradient; `mask`: the first has none where the incoming eta leaves the box.
template <class T>
void linf_steps(const Params& p, const T* x, const T* g, int64_t steps, bool mask, T* eta) {
  constexpr int64_t kTile = 128;
  const int64_t pixels = p.height * p.width;
  T e[kTile] = {}, a[kTile] = {}, b[kTile] = {}, step[kTile] = {};
  for (int64_t c = 0; c < p.channels; ++c) {
    const ChannelThreat<T> threat(p, c);
    for (int64_t begin = c * pixels, end = begin + pixels; begin < end; begin += kTile) {
      const int64_t n = end - begin < kTile ? end - begin : kTile;
      const T *es = eta + begin, *xs = x + begin, *gs = g + begin;
      for (int64_t i = 0; i < n; ++i) {
        const Interval<T> interval = admissible_interval(xs[i], threat.eps, threat.lo, threat.hi);
        a[i] = interval.a;
        b[i] = interval.b;
        step[i] = signed_step(gs[i], threat.step_size);
        const T first = mask ? masked(step[i], es[i], interval.lower, interval.upper) : step[i];
        e[i] = project(es[i] + first, a[i], b[i]);
      }
      for (int64_t i = 0; i < n && steps > 1; i += kLanes<T>)
        store(e + i, further_steps<T>(load(e + i), load(step + i), load(a + i), load(b + i), steps - 1));
      copy_row(e, eta + begin, n);
    }
  }
}

// g / ||g||_2 into `direction`; false (and zeros) where that does not exist. Scaled by the largest magnitude, so that
// no scale of g overflows or underflows.
template <class T>
bool l2_direction(const T* g, int64_t n, T* direction) {
  T largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const T m = std::fabs(g[i]);
    finite = finite && m - m == T(0);
    largest = m > largest ? m : largest;
  }
  if (!finite || largest == T(0)) {
    std::memset(direction, 0, static_cast<size_t>(n) * sizeof(T));
    return false;
  }
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    direction[i] = g[i] / largest;
    sum += static_cast<double>(direction[i]) * static_cast<double>(direction[i]);
  }
  const T norm = static_cast<T>(std::sqrt(sum));
  for (int64_t i = 0; i < n; ++i) direction[i] /= norm;
  return true;
}

// eta = clamp(ball(eta + step_size * direction), box).
template <class T>
void l2_project(const Params& p, const T* x, T* eta) {
  const ChannelThreat<T> threat(p, 0);
  const int64_t pixels = p.height * p.width, n = p.channels * pixels;
  T largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(eta[i] == eta[i])) eta[i] = T(0);
    const T m = std::fabs(eta[i]);
    largest = m > largest ? m : largest;
  }
  double sum = 0;
  for (int64_t i = 0; i < n && largest > T(0); ++i) {
    const double scaled = static_cast<double>(eta[i]) / static_cast<double>(largest);
    sum += scaled * scaled;
  }
  const T norm = static_cast<T>(static_cast<double>(largest) * std::sqrt(sum));
  const T factor = norm > threat.eps ? threat.eps / norm : T(1);
  for (int64_t c = 0; c < p.channels; ++c) {
    const T lo = static_cast<T>(p.lo[c]), hi = static_cast<T>(p.hi[c]);
    for (int64_t i = c * pixels; i < (c + 1) * pixels; ++i) {
      const T below = lo - x[i], above = hi - x[i];
      eta[i] = project(eta[i] * factor, below < T(0) ? below : T(0), above > T(0) ? above : T(0));
    }
  }
}

// `steps` L2 steps along a fixed gradient: one unit vector for all, or (`mask`) one of the masked gradient for the
// first step and one for the rest. `scratch`: C*H*W elements.
template <class T>
void l2_steps(const Params& p, const T* x, const T* g, int64_t steps, bool mask, T* eta, T* scratch) {
  const int64_t pixels = p.height * p.width, n = p.channels * pixels;
  const T step_size = static_cast<T>(p.step_size[0]);
  for (int64_t k = 0; k < steps; ++k) {
    const bool masks = mask && k == 0;
    if (masks) {
      for (int64_t c = 0; c < p.channels; ++c) {
        const ChannelThreat<T> threat(p, c);
        for (int64_t i = c * pixels; i < (c + 1) * pixels; ++i) {
          const Interval<T> interval = admissible_interval(x[i], threat.eps, threat.lo, threat.hi);
          scratch[i] = masked(g[i], eta[i], interval.lower, interval.upper);
        }
      }
    }
    if (k == 0 || (mask && k == 1)) l2_direction(masks ? scratch : g, n, scratch);
    for (int64_t i = 0; i < n; ++i) eta[i] += step_size * scratch[i];
    l2_project(p, x, eta);
  }
}

}  // namespace yopo::YOPO_ISA
