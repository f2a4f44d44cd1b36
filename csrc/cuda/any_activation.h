// An activation chosen at run time; the choice is uniform over the launch.
#pragma once

#include "core/activations.h"
#include "cuda/primitives.h"

namespace yopo::cuda {

template <class T>
YOPO_DEVICE T activation_value(Activation activation, T z, T negative_slope) {
  switch (activation) {
    case Activation::kIdentity:
      return z;
    case Activation::kRelu:
      return Relu::value(z, negative_slope);
    case Activation::kLeakyRelu:
      return LeakyRelu::value(z, negative_slope);
    case Activation::kGelu:
      return Gelu::value(z, negative_slope);
    case Activation::kGeluTanh:
      return GeluTanh::value(z, negative_slope);
    default:
      return Silu::value(z, negative_slope);
  }
}

template <class T>
YOPO_DEVICE T activation_slope(Activation activation, T z, T negative_slope) {
  switch (activation) {
    case Activation::kIdentity:
      return T(1);
    case Activation::kRelu:
      return Relu::slope(z, negative_slope);
    case Activation::kLeakyRelu:
      return LeakyRelu::slope(z, negative_slope);
    case Activation::kGelu:
      return Gelu::slope(z, negative_slope);
    case Activation::kGeluTanh:
      return GeluTanh::slope(z, negative_slope);
    default:
      return Silu::slope(z, negative_slope);
  }
}

}  // namespace yopo::cuda
