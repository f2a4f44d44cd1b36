// Layer 1, CPU. fp32 activations that need exp, on whole vectors; a scalar library call per pixel would cost more than
// the convolutions. Absolute errors are below 2e-7 (sigmoid, tanh, the Gaussian's distribution function), a rounding or
// two.
#pragma once

#include "core/activations.h"
#include "cpu/simd.h"

namespace yopo::YOPO_ISA {

typedef int32_t IntVec __attribute__((vector_size(YOPO_VECTOR_BYTES)));
using FloatVec = Vec<float>;

YOPO_HD FloatVec exp_of(FloatVec x) {
  // 2^n e^r with |r| <= ln(2) / 2; the limits keep 2^n a normal number.
  x = x < -87.0f ? FloatVec{} - 87.0f : x;
  x = x > 88.0f ? FloatVec{} + 88.0f : x;
  const FloatVec magic = FloatVec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const FloatVec shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  const FloatVec r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  FloatVec poly = r * (1.0f / 720) + 1.0f / 120;
  poly = poly * r + 1.0f / 24;
  poly = poly * r + 1.0f / 6;
  poly = poly * r + 0.5f;
  poly = poly * r * r + r + 1.0f;
  IntVec exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent - 0x4B400000 + 127) << 23;
  FloatVec scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return poly * scale;
}

YOPO_HD FloatVec sigmoid_of(FloatVec z) { return 1.0f / (1.0f + exp_of(-z)); }

YOPO_HD FloatVec gaussian_cdf_of(FloatVec z) {
  // erfc by Abramowitz and Stegun 7.1.26, on |z| / sqrt(2); the other half by symmetry.
  const FloatVec a = (z < 0.0f ? -z : z) * 0.70710678118654752f;
  const FloatVec t = 1.0f / (1.0f + a * 0.3275911f);
  FloatVec poly = t * 1.061405429f - 1.453152027f;
  poly = poly * t + 1.421413741f;
  poly = poly * t - 0.284496736f;
  poly = poly * t + 0.254829592f;
  const FloatVec tail = 0.5f * poly * t * exp_of(-(a * a));
  return z < 0.0f ? tail : 1.0f - tail;
}

YOPO_HD FloatVec gelu_tanh_sigmoid_of(FloatVec z) {  // 0.5 * (1 + tanh(v)) = sigmoid(2v)
  return sigmoid_of(1.5957691216057308f * (z + 0.044715f * z * z * z));
}

YOPO_HD FloatVec value_of(Silu, FloatVec z) { return z * sigmoid_of(z); }
YOPO_HD FloatVec slope_of(Silu, FloatVec z) {
  const FloatVec s = sigmoid_of(z);
  return s * (1.0f + z * (1.0f - s));
}
YOPO_HD FloatVec value_of(Gelu, FloatVec z) { return z * gaussian_cdf_of(z); }
YOPO_HD FloatVec slope_of(Gelu, FloatVec z) {
  return gaussian_cdf_of(z) + z * exp_of(-0.5f * z * z) * 0.39894228040143267794f;
}
YOPO_HD FloatVec value_of(GeluTanh, FloatVec z) { return z * gelu_tanh_sigmoid_of(z); }
YOPO_HD FloatVec slope_of(GeluTanh, FloatVec z) {
  const FloatVec s = gelu_tanh_sigmoid_of(z);
  return s + z * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 3.0f * 0.044715f * z * z);
}

// to[q] = act(z[q]), or p[q] * act'(z[q]): whole vectors where that pays, else left to the compiler.
template <class Act, class T>
void activate_row(const T* z, int64_t size, T negative_slope, T* to) {
  if constexpr (!Act::kSimple && sizeof(T) == sizeof(float)) {
    for (int64_t q = 0; q < size; q += kLanes<T>) store(to + q, value_of(Act{}, load(z + q)));
  } else {
    for (int64_t q = 0; q < size; ++q) to[q] = Act::value(z[q], negative_slope);
  }
}
template <class Act, class T>
void mask_row(const T* __restrict p, const T* __restrict z, int64_t size, T negative_slope, T* __restrict to) {
  if constexpr (!Act::kSimple && sizeof(T) == sizeof(float)) {
    for (int64_t q = 0; q < size; q += kLanes<T>) store(to + q, load(p + q) * slope_of(Act{}, load(z + q)));
  } else {
    for (int64_t q = 0; q < size; ++q) to[q] = p[q] * Act::slope(z[q], negative_slope);
  }
}

}  // namespace yopo::YOPO_ISA
