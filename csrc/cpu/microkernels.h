// Layer 1, CPU. The three contractions of a convolution on flat planes (core/geometry.h), blocked over registers.
//
// Each is `acc[i][v] += w[i] * stream[v]` in a different guise; the loops over blocks pick the widest instantiation that fits
// and finish with narrower ones.
#pragma once

#include "cpu/blocking.h"

namespace yopo::YOPO_ISA {

// 1) Input gradient: g[c][i] += sum over k, taps of weight[k][tap][c] * p[k][i - offset[tap]], for C channels and V vectors.
template <class T, int C, int V>
YOPO_HD void dgrad_tile(const T* p, int64_t p_stride, int64_t kernels, const int64_t* offsets, int64_t taps,
                        const T* weight, T* g, int64_t g_stride) {
  Vec<T> acc[C][V];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[c][v] = load(g + c * g_stride + v * kLanes<T>);
  for (int64_t k = 0; k < kernels; ++k, p += p_stride)
    for (int64_t t = 0; t < taps; ++t, weight += C) {
      const T* from = p - offsets[t];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const Vec<T> stream = load(from + v * kLanes<T>);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) acc[c][v] += weight[c] * stream;
      }
    }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(g + c * g_stride + v * kLanes<T>, acc[c][v]);
}

template <class T, int C>
void dgrad(const T* p, int64_t p_stride, int64_t kernels, const int64_t* offsets, int64_t taps, const T* weight, T* g,
           int64_t g_stride, int64_t begin, int64_t end, Prefetch& ahead) {
  constexpr int kFit = kBlocking.dgrad_accumulators / C, kWide = kFit < 12 ? kFit : 12, kHalf = (kWide + 1) / 2;
  constexpr int64_t kStep = kLanes<T>;
  int64_t i = begin;
  for (; end - i > (kWide - 1) * kStep; i += kWide * kStep) {
    ahead.turn();
    dgrad_tile<T, C, kWide>(p + i, p_stride, kernels, offsets, taps, weight, g + i, g_stride);
  }
  for (; end - i > (kHalf - 1) * kStep; i += kHalf * kStep)
    dgrad_tile<T, C, kHalf>(p + i, p_stride, kernels, offsets, taps, weight, g + i, g_stride);
  for (; i < end; i += kStep) dgrad_tile<T, C, 1>(p + i, p_stride, kernels, offsets, taps, weight, g + i, g_stride);
}

// 2) Forward: z[k][q] = bias[k] + sum over channels and taps of weight[tap][k] * u[q + offset[tap]] (a tap counts per
//    channel here).
template <class T, int K, int V>
YOPO_HD void forward_tile(const T* u, const int64_t* offsets, int64_t taps, const T* weight, const T* bias, T* z,
                          int64_t z_stride) {
  Vec<T> acc[K][V];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[k][v] = Vec<T>{} + bias[k];
  for (int64_t t = 0; t < taps; ++t, weight += K) {
    const T* from = u + offsets[t];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const Vec<T> stream = load(from + v * kLanes<T>);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) acc[k][v] += weight[k] * stream;
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(z + k * z_stride + v * kLanes<T>, acc[k][v]);
}

template <class T, int K>
void forward(const T* u, const int64_t* offsets, int64_t taps, const T* weight, const T* bias, int64_t size, T* z,
             int64_t z_stride) {
  constexpr int kWide = kBlocking.forward_vectors;
  constexpr int64_t kStep = kLanes<T>;
  int64_t q = 0;
  for (; size - q > (kWide - 1) * kStep; q += kWide * kStep)
    forward_tile<T, K, kWide>(u + q, offsets, taps, weight, bias, z + q, z_stride);
  for (; size - q > kStep; q += 2 * kStep) forward_tile<T, K, 2>(u + q, offsets, taps, weight, bias, z + q, z_stride);
  for (; q < size; q += kStep) forward_tile<T, K, 1>(u + q, offsets, taps, weight, bias, z + q, z_stride);
}

// 3) Weight gradient: sums[k][tap][lane] += p[k][q] * u[q + offset[tap]] over all q; lanes stay apart (see the task loop).
template <class T, int K, int N>
YOPO_HD void wgrad_tile(const T* p, int64_t p_stride, const T* u, const int64_t* offsets, int64_t size, T* sums,
                        int64_t sums_stride) {
  Vec<T> acc[K][N];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) acc[k][n] = load(sums + k * sums_stride + n * kLanes<T>);
  const T* from[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) from[n] = u + offsets[n];
  for (int64_t q = 0; q < size; q += kLanes<T>) {
    Vec<T> stream[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) stream[k] = load(p + k * p_stride + q);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const Vec<T> pixel = load(from[n] + q);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) acc[k][n] += stream[k] * pixel;
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(sums + k * sums_stride + n * kLanes<T>, acc[k][n]);
}

template <class T, int K>
void wgrad(const T* p, int64_t p_stride, const T* u, const int64_t* offsets, int64_t taps, int64_t size, T* sums,
           int64_t sums_stride) {
  constexpr int kWide = kBlocking.wgrad_taps;
  int64_t t = 0;
  for (; taps - t >= kWide; t += kWide)
    wgrad_tile<T, K, kWide>(p, p_stride, u, offsets + t, size, sums + t * kLanes<T>, sums_stride);
  for (; taps - t >= 3; t += 3)
    wgrad_tile<T, K, 3>(p, p_stride, u, offsets + t, size, sums + t * kLanes<T>, sums_stride);
  for (; t < taps; ++t) wgrad_tile<T, K, 1>(p, p_stride, u, offsets + t, size, sums + t * kLanes<T>, sums_stride);
}

// Runtime block width to template argument. Usage: with_width<4>(n, [&](auto width) { f<T, decltype(width)::value>(...); });
template <int N>
struct Width {
  static constexpr int value = N;
};
template <int Max, class F>
YOPO_HD void with_width(int64_t n, const F& f) {
  if constexpr (Max > 1) {
    if (n < Max) return with_width<Max - 1>(n, f);
  }
  f(Width<Max>{});
}

}  // namespace yopo::YOPO_ISA
