// Layer 0. Activations and their slopes; at the kink relu' = 0 and leaky_relu' = negative_slope.
//
// To add one: a row here, a row in `dispatch_activation`, its number in params.h and yopo_ext/kernels/constants.py, and
// its definition in yopo_ext/kernels/reference.py.
#pragma once

#include <cmath>

#include "core/macros.h"
#include "core/params.h"

namespace yopo {

struct Identity {
  static constexpr bool kSimple = true;  // slope needs no transcendental: the compiler vectorises it
  template <class T>
  static YOPO_HD T value(T z, T) {
    return z;
  }
  template <class T>
  static YOPO_HD T slope(T, T) {
    return T(1);
  }
};

struct Relu {
  static constexpr bool kSimple = true;
  template <class T>
  static YOPO_HD T value(T z, T) {
    return z < T(0) ? T(0) : z;
  }  // keeps a NaN
  template <class T>
  static YOPO_HD T slope(T z, T) {
    return z > T(0) ? T(1) : T(0);
  }
};

struct LeakyRelu {
  static constexpr bool kSimple = true;
  template <class T>
  static YOPO_HD T value(T z, T negative_slope) {
    return z > T(0) ? z : z * negative_slope;
  }
  template <class T>
  static YOPO_HD T slope(T z, T negative_slope) {
    return z > T(0) ? T(1) : negative_slope;
  }
};

struct Gelu {
  static constexpr bool kSimple = false;
  template <class T>
  static YOPO_HD T cdf(T z) {
    return T(0.5) * (T(1) + std::erf(z * T(0.70710678118654752440)));
  }
  template <class T>
  static YOPO_HD T value(T z, T) {
    return z * cdf(z);
  }
  template <class T>
  static YOPO_HD T slope(T z, T) {
    return cdf(z) + z * std::exp(T(-0.5) * z * z) * T(0.39894228040143267794);
  }
};

struct GeluTanh {
  static constexpr bool kSimple = false;
  template <class T>
  static YOPO_HD T inner_tanh(T z) {
    return std::tanh(T(0.79788456080286535588) * (z + T(0.044715) * z * z * z));
  }
  template <class T>
  static YOPO_HD T value(T z, T) {
    return T(0.5) * z * (T(1) + inner_tanh(z));
  }
  template <class T>
  static YOPO_HD T slope(T z, T) {
    const T t = inner_tanh(z);
    return T(0.5) * (T(1) + t) +
           T(0.5) * z * (T(1) - t * t) * T(0.79788456080286535588) * (T(1) + T(3 * 0.044715) * z * z);
  }
};

struct Silu {
  static constexpr bool kSimple = false;
  template <class T>
  static YOPO_HD T sigmoid(T z) {
    return T(1) / (T(1) + std::exp(-z));
  }
  template <class T>
  static YOPO_HD T value(T z, T) {
    return z * sigmoid(z);
  }
  template <class T>
  static YOPO_HD T slope(T z, T) {
    const T s = sigmoid(z);
    return s * (T(1) + z * (T(1) - s));
  }
};

// Calls f(Activation type) for the runtime value; Usage: dispatch_activation(a, [&](auto act) { using Act =
// decltype(act); ... })
template <class F>
YOPO_HD void dispatch_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kIdentity:
      return f(Identity{});
    case Activation::kRelu:
      return f(Relu{});
    case Activation::kLeakyRelu:
      return f(LeakyRelu{});
    case Activation::kGelu:
      return f(Gelu{});
    case Activation::kGeluTanh:
      return f(GeluTanh{});
    case Activation::kSilu:
      return f(Silu{});
  }
}

}  // namespace yopo
