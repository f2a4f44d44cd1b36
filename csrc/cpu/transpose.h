// Layer 1, CPU. Square blocks turned over in registers: between pixels of channels (channels_last) and planes of
// pixels.
#pragma once

#include "core/narrow.h"
#include "cpu/simd.h"

namespace yopo::YOPO_ISA {

#if defined(__clang__)
// clang has no shuffle by a vector of indices known only to the optimiser; lanes one by one compile to the same moves.
template <class T, class Index>
YOPO_HD Vec<T> pick(Vec<T> a, Vec<T> b, Index at) {
  Vec<T> out;
  for (int64_t i = 0; i < kLanes<T>; ++i) out[i] = at[i] < kLanes<T> ? a[at[i]] : b[at[i] - kLanes<T>];
  return out;
}
#else
template <class T, class Index>
YOPO_HD Vec<T> pick(Vec<T> a, Vec<T> b, Index at) {
  return __builtin_shuffle(a, b, at);
}
#endif

template <class T>
struct LaneIndex;
template <>
struct LaneIndex<float> {
  typedef int32_t Vector __attribute__((vector_size(YOPO_VECTOR_BYTES)));
};
template <>
struct LaneIndex<double> {
  typedef int64_t Vector __attribute__((vector_size(YOPO_VECTOR_BYTES)));
};

// rows[i][j] <-> rows[j][i] for kLanes x kLanes values: each round exchanges the off-diagonal halves of ever smaller
// blocks.
template <class T, int kDistance = kLanes<T> / 2>
YOPO_HD void transpose_block(Vec<T>* rows) {
  if constexpr (kDistance > 0) {
    typename LaneIndex<T>::Vector upper, lower;
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const bool right = (lane & kDistance) != 0;
      upper[lane] = right ? static_cast<int>(kLanes<T>) + lane - kDistance : lane;
      lower[lane] = right ? static_cast<int>(kLanes<T>) + lane : lane + kDistance;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if ((i & kDistance) == 0) {
        const Vec<T> a = rows[i], b = rows[i + kDistance];
        rows[i] = pick<T>(a, b, upper);
        rows[i + kDistance] = pick<T>(a, b, lower);
      }
    transpose_block<T, kDistance / 2>(rows);
  }
}

template <class T, class P>
YOPO_HD Vec<T> load_widened(const P* from) {
  if constexpr (std::is_same_v<T, P>) {
    return load(from);
  } else {
    T lanes[kLanes<T>];
    for (int64_t i = 0; i < kLanes<T>; ++i) lanes[i] = static_cast<T>(widen(from[i]));
    return load(lanes);
  }
}

template <class T, class P>
YOPO_HD void store_narrowed(P* to, Vec<T> v) {
  if constexpr (std::is_same_v<T, P>) {
    store(to, v);
  } else if constexpr (std::is_same_v<P, BFloat16> && sizeof(T) == sizeof(float)) {  // core/narrow.h, on whole vectors
    typedef uint32_t Wide __attribute__((vector_size(YOPO_VECTOR_BYTES)));
    typedef uint16_t Narrow __attribute__((vector_size(YOPO_VECTOR_BYTES / 2)));
    const Wide bits = bit_cast<Wide>(v);
    const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Narrow half = __builtin_convertvector(v == v ? rounded : Wide{} + 0x7fc0u, Narrow);
    std::memcpy(to, &half, sizeof(half));
  } else {
    T lanes[kLanes<T>];
    store(lanes, v);
    for (int64_t i = 0; i < kLanes<T>; ++i) to[i] = narrow<P>(lanes[i]);
  }
}

// `count` >= kLanes pixels of kLanes channels, `from_stride` apart, into kLanes planes; the last block may overlap the
// one before.
template <class T, class P>
void pixels_to_planes(const P* from, int64_t from_stride, int64_t count, T* to, int64_t to_stride) {
  constexpr int64_t kN = kLanes<T>;
  for (int64_t done = 0; done < count; done += kN) {
    const int64_t w = done + kN <= count ? done : count - kN;
    Vec<T> rows[kN];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kN; ++i) rows[i] = load_widened<T>(from + (w + i) * from_stride);
    transpose_block<T>(rows);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kN; ++i) store(to + i * to_stride + w, rows[i]);
  }
}

template <class T, class P>
void planes_to_pixels(const T* from, int64_t from_stride, int64_t count, P* to, int64_t to_stride) {
  constexpr int64_t kN = kLanes<T>;
  for (int64_t done = 0; done < count; done += kN) {
    const int64_t w = done + kN <= count ? done : count - kN;
    Vec<T> rows[kN];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kN; ++i) rows[i] = load(from + i * from_stride + w);
    transpose_block<T>(rows);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kN; ++i) store_narrowed<T>(to + (w + i) * to_stride, rows[i]);
  }
}

}  // namespace yopo::YOPO_ISA
