// Reading costates and writing outputs of any dtype.
#pragma once

#include "core/narrow.h"
#include "core/params.h"
#include "cuda/primitives.h"

namespace yopo::cuda {

YOPO_DEVICE float float_from_bfloat(uint16_t bits) { return widen(BFloat16{bits}); }
YOPO_DEVICE uint16_t bfloat_from_float(float value) { return narrow<BFloat16>(value).bits; }

// Element `index` of an array of run-time dtype.
template <class T>
YOPO_DEVICE T load_as(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return T(ld_stream(static_cast<const float*>(data) + index));
    case DType::kFloat64:
      return T(ld_stream(static_cast<const double*>(data) + index));
    case DType::kBFloat16:
      return T(float_from_bfloat(ld_stream(static_cast<const uint16_t*>(data) + index)));
    default:
      return T(float_from_half(ld_stream(static_cast<const uint16_t*>(data) + index)));
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
