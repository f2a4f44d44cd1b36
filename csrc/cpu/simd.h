// Layer 1, CPU. Vectors through the compiler's vector extensions; one width per instruction set.
//
// Everything below namespace yopo::YOPO_ISA is compiled once per instruction set (see CMakeLists.txt), under distinct
// names.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/macros.h"

#ifndef YOPO_ISA
#define YOPO_ISA baseline
#define YOPO_VECTOR_BYTES 16
#define YOPO_REGISTERS 16
#endif

namespace yopo::YOPO_ISA {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(YOPO_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(YOPO_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(YOPO_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(YOPO_VECTOR_BYTES), aligned(8), may_alias));
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
inline constexpr int64_t kLanes = YOPO_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

template <class T>
YOPO_HD Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(from);
}
template <class T>
YOPO_HD void store(T* to, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(to) = v;
}
// Keeps the compiler from recomputing or reloading a value at each of its uses.
template <class V>
YOPO_HD void keep_in_register([[maybe_unused]] V& value) {
#if defined(__x86_64__)
  if constexpr (std::is_pointer_v<V>) {
    asm("" : "+r"(value));
  } else {
    asm("" : "+v"(value));
  }
#endif
}

// `chosen` in the first n lanes, `rest` in the others.
template <class T>
YOPO_HD Vec<T> select_first(int64_t n, Vec<T> chosen, Vec<T> rest) {
  if (n >= kLanes<T>) return chosen;
  Vec<T> lane;
  for (int64_t i = 0; i < kLanes<T>; ++i) lane[i] = static_cast<T>(i);
  return lane < static_cast<T>(n) ? chosen : rest;
}

// The sum of a vector's lanes, by halves: always in the same order.
template <class T, int kBytes>
struct Halves {
  typedef T Half __attribute__((vector_size(kBytes / 2)));
};
template <class T, int kBytes = YOPO_VECTOR_BYTES, class V>
YOPO_HD T lane_sum(V v) {
  if constexpr (kBytes == 2 * sizeof(T)) {
    return v[0] + v[1];
  } else {
    typename Halves<T, kBytes>::Half half[2];
    std::memcpy(half, &v, kBytes);
    return lane_sum<T, kBytes / 2>(half[0] + half[1]);
  }
}

// Memory wanted soon, asked for a few cache lines at a time between other work.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const void* from, int64_t bytes, int64_t turns)
      : next_(static_cast<const char*>(from)), end_(next_ + bytes), per_turn_((bytes / turns / kLine + 1) * kLine) {}

  YOPO_HD void turn() {
    const char* until = end_ - next_ < per_turn_ ? end_ : next_ + per_turn_;
    for (; next_ < until; next_ += kLine) __builtin_prefetch(next_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_ = nullptr;
  const char* end_ = nullptr;
  int64_t per_turn_ = 0;
};

YOPO_HD int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace yopo::YOPO_ISA
