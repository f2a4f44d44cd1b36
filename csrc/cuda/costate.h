// Reading costates and writing outputs of any dtype.
#pragma once

#include "core/narrow.h"
#include "core/params.h"
#include "cuda/primitives.h"

namespace yopo::cuda {

YOPO_DEVICE float float_from_bfloat(uint16_t bits) { return widen(BFloat16{bits}); }
YOPO_DEVICE uint16_t bfloat_from_float(float value) { return narrow<BFloat16>(value).bits; }

YOPO_DEVICE float load_element(const float* at) { return ld_stream(at); }
YOPO_DEVICE double load_element(const double* at) { return ld_stream(at); }
YOPO_DEVICE float load_element(const BFloat16* at) {
  return float_from_bfloat(ld_stream(reinterpret_cast<const uint16_t*>(at)));
}
YOPO_DEVICE float load_element(const Float16* at) {
  return float_from_half(ld_stream(reinterpret_cast<const uint16_t*>(at)));
}

// f(a typed pointer to the first element of an array of run-time dtype): the choice is made once, not per element.
template <class F>
YOPO_DEVICE void with_dtype(const void* data, DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(data));
    case DType::kFloat64:
      return f(static_cast<const double*>(data));
    case DType::kBFloat16:
      return f(static_cast<const BFloat16*>(data));
    default:
      return f(static_cast<const Float16*>(data));
  }
}

template <class T>
YOPO_DEVICE void store_as(void* data, DType dtype, int64_t index, T value) {
  switch (dtype) {
    case DType::kFloat32:
      return st_stream(static_cast<float*>(data) + index, float(value));
    case DType::kFloat64:
      return st_stream(static_cast<double*>(data) + index, double(value));
    case DType::kBFloat16:
      return st_stream(static_cast<uint16_t*>(data) + index, bfloat_from_float(float(value)));
    default:
      return st_stream(static_cast<uint16_t*>(data) + index, half_from_float(float(value)));
  }
}

}  // namespace yopo::cuda
