// Layer 1, CPU. The three contractions of a convolution on flat planes (core/geometry.h), blocked over registers.
//
// Each is `acc[i][v] += w[i] * stream[v]` in a different guise; the loops over blocks pick the widest instantiation
// that fits and finish with narrower ones.
#pragma once

#include "cpu/blocking.h"

namespace yopo::YOPO_ISA {

// Runtime block width to template argument. Usage: with_width<4>(n, [&](auto width) { f<T,
// decltype(width)::value>(...); });
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

// 1) Input gradient: g[c][i] += sum over k, taps of weight[k][tap][c] * p[k][i - offset[tap]], for C channels and V
// vectors.
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

// 1b) The same for one channel and a dense 3 x 3 kernel. With one channel every loaded costate vector would feed one
// FMA;
//     here J rows of the plane share it across the kernel's rows. Only `width` columns of the last vectors are stored.
template <class T, int J, int V>
YOPO_HD void dgrad_rows_tile(const T* p, int64_t p_stride, int64_t kernels, int64_t row_stride, const T* weight, T* g,
                             int64_t width) {
  constexpr int kR = 3, kS = 3;
  Vec<T> acc[J][V];
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[j][v] = load(g + j * row_stride + v * kLanes<T>);
  for (int64_t k = 0; k < kernels; ++k, p += p_stride, weight += kR * kS) {
    const T* from = p - (kR - 1) * row_stride;
#pragma GCC unroll 16
    for (int row = 1 - kR; row < J; ++row, from += row_stride) {
      keep_in_register(from);  // else every load becomes an induction variable of its own, and they spill
#pragma GCC unroll 16
      for (int s = 0; s < kS; ++s)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          Vec<T> stream = load(from - s + v * kLanes<T>);
          keep_in_register(stream);  // else it is loaded again for every FMA
#pragma GCC unroll 16
          for (int r = 0; r < kR; ++r)
            if (row + r >= 0 && row + r < J) acc[row + r][v] += weight[r * kS + s] * stream;
        }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      T* to = g + j * row_stride + v * kLanes<T>;
      store(to, select_first<T>(width - v * kLanes<T>, acc[j][v], load(to)));
    }
}

template <class T>
void dgrad_rows(const T* p, int64_t p_stride, int64_t kernels, int64_t row_stride, const T* weight, T* g, int64_t begin,
                int64_t end, Prefetch& ahead) {  // whole rows [begin, end)
  constexpr int kJ = kBlocking.dgrad_rows;
  for (int64_t row = begin; row < end;) {
    ahead.turn();
    const int64_t rows = end - row >= kJ ? kJ : 1;
    for (int64_t column = 0; column < row_stride; column += 2 * kLanes<T>) {
      const int64_t at = row * row_stride + column, width = row_stride - column;
      with_width<2>(width > kLanes<T> ? 2 : 1, [&](auto vectors) {
        constexpr int kV = decltype(vectors)::value;
        if (rows == kJ) {
          dgrad_rows_tile<T, kJ, kV>(p + at, p_stride, kernels, row_stride, weight, g + at, width);
        } else {
          dgrad_rows_tile<T, 1, kV>(p + at, p_stride, kernels, row_stride, weight, g + at, width);
        }
      });
    }
    row += rows;
  }
}

// 2) Forward: z[k][q] = bias[k] + sum over channels and taps of weight[tap][k] * u[q + offset[tap]] (a tap counts per
//    channel here), handed to `finish(k, q, z)` while it is in registers.
template <class T, int K, int V, class Finish>
YOPO_HD void forward_tile(const T* u, const int64_t* offsets, int64_t taps, const T* weight, const T* bias, int64_t q,
                          const Finish& finish) {
  Vec<T> acc[K][V];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[k][v] = Vec<T>{} + bias[k];
  for (int64_t t = 0; t < taps; ++t, weight += K) {
    const T* from = u + q + offsets[t];
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
    for (int v = 0; v < V; ++v) finish(k, q + v * kLanes<T>, acc[k][v]);
}

template <class T, int K, class Finish>
void forward(const T* u, const int64_t* offsets, int64_t taps, const T* weight, const T* bias, int64_t size,
             const Finish& finish) {
  constexpr int kWide = kBlocking.forward_vectors;
  constexpr int64_t kStep = kLanes<T>;
  int64_t q = 0;
  for (; size - q > (kWide - 1) * kStep; q += kWide * kStep)
    forward_tile<T, K, kWide>(u, offsets, taps, weight, bias, q, finish);
  for (; size - q > kStep; q += 2 * kStep) forward_tile<T, K, 2>(u, offsets, taps, weight, bias, q, finish);
  for (; q < size; q += kStep) forward_tile<T, K, 1>(u, offsets, taps, weight, bias, q, finish);
}

// What becomes of a pre-activation: stored, or (ReLU) at once the costate masked by its sign.
template <class T>
struct StorePreActivation {
  T* z;
  int64_t stride;
  YOPO_HD void skip(int64_t channels) { z += channels * stride; }
  YOPO_HD void operator()(int64_t k, int64_t q, Vec<T> v) const { store(z + k * stride + q, v); }
};
template <class T>
struct MaskCostateByRelu {
  const T* costate;
  T* to;
  int64_t stride;
  YOPO_HD void skip(int64_t channels) { costate += channels * stride, to += channels * stride; }
  YOPO_HD void operator()(int64_t k, int64_t q, Vec<T> v) const {
    store(to + k * stride + q, v > T(0) ? load(costate + k * stride + q) : Vec<T>{});
  }
};

// 3) Weight gradient: sums[k][tap][lane] += p[k][q] * u[q + offset[tap]] over all q; lanes stay apart (see the task
// loop).
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

}  // namespace yopo::YOPO_ISA
