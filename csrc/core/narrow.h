// Layer 0. bfloat16 and float16 as bits: conversions every compiler and processor agrees on.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace yopo {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
YOPO_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

YOPO_HD float widen(float v) { return v; }
YOPO_HD double widen(double v) { return v; }
YOPO_HD float widen(BFloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
YOPO_HD float widen(Float16 v) {
  // Exponent and fraction moved into place, then rescaled by 2^112: exact for subnormals too.
  const uint32_t magnitude = (v.bits & 0x7fffu) << 13, sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const float scaled = bit_cast<float>(magnitude) * 5.192296858534828e33f;
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  const bool special = (v.bits & 0x7c00u) == 0x7c00u;  // infinity or NaN
  return bit_cast<float>((special ? (magnitude | 0x7f800000u) : finite) | sign);
}

template <class To>
YOPO_HD To narrow(float v);
template <>
YOPO_HD float narrow<float>(float v) {
  return v;
}
template <>
YOPO_HD double narrow<double>(float v) {
  return static_cast<double>(v);
}
template <>
YOPO_HD BFloat16 narrow<BFloat16>(float v) {  // to nearest, ties to even
  const uint32_t u = bit_cast<uint32_t>(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(v == v ? rounded : 0x7fc0u)};
}
template <>
YOPO_HD Float16 narrow<Float16>(float v) {  // to nearest, ties to even
  const uint32_t u = bit_cast<uint32_t>(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (sum - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}
template <class To>
YOPO_HD To narrow(double v) {  // double results keep their precision only in double outputs
  if constexpr (sizeof(To) == 8) {
    return static_cast<To>(v);
  } else {
    return narrow<To>(static_cast<float>(v));
  }
}

}  // namespace yopo
