// Sums and maxima over a block, in a fixed order: the same bits in every run.
#pragma once

#include "cuda/primitives.h"

namespace yopo::cuda {

struct Sum {
  template <class T>
  static YOPO_DEVICE T combine(T a, T b) {
    return a + b;
  }
};

struct Largest {  // keeps a NaN
  template <class T>
  static YOPO_DEVICE T combine(T a, T b) {
    return (a > b || a != a) ? a : b;
  }
};

// Every thread gets the result. `scratch` holds one value per warp and is free again on return.
template <class Operation, class T>
YOPO_DEVICE T block_reduce(T value, T* scratch) {
  for (int mask = 16; mask > 0; mask /= 2) value = Operation::combine(value, shfl_xor(value, mask));
  if (lane() == 0) scratch[warp()] = value;
  sync<1>();
  T all = scratch[0];
  for (int w = 1; w < size() / 32; ++w) all = Operation::combine(all, scratch[w]);
  sync<2>();
  return all;
}

}  // namespace yopo::cuda
