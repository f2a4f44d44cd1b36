// Fragments of the fused kernel: precision, 2x2 blocks of costates, activations.
#pragma once

#include "cuda/any_activation.h"
#include "cuda/costate.h"
#include "cuda/fused_plan.h"

namespace yopo::cuda {

// Operands of one mma as tf32, whose low 13 bits the tensor core leaves out. Precise: value = high + low, and three
// products (two where the low part is zero) recover fp32's accuracy; the sign of `low` is random, so leaving out its
// last bits has no bias. kExact: the values have no more bits than tf32.
template <bool kPrecise, int N, bool kExact_ = false>
struct Operand {
  static constexpr bool kExact = kExact_;
  uint32_t high[N];
  uint32_t low[kPrecise && !kExact ? N : 1];

  YOPO_DEVICE void set(int i, float value) {  // rounds
    if constexpr (kExact) {
      high[i] = float_bits(value);
    } else if constexpr (kPrecise) {
      // a NaN may leave `high`, but not `low`
      high[i] = (float_bits(value) + 0x1000u) & 0xFFFFE000u;
      low[i] = float_bits(value - bits_float(high[i]));
    } else {
      high[i] = to_tf32(value);
    }
  }
  YOPO_DEVICE void set_rounded(int i, float value) {  // shared memory holds rounded values unless kPrecise
    if constexpr (kPrecise) {
      set(i, value);
    } else {
      high[i] = float_bits(value);
    }
  }
};

template <bool kPrecise>
YOPO_DEVICE float shared_precision(float value) {  // what set_rounded expects
  return kPrecise ? value : bits_float(to_tf32(value));
}

template <bool kPrecise, bool kExact>
YOPO_DEVICE void multiply_add(float (&d)[4], const Operand<kPrecise, 4, kExact>& a, const Operand<kPrecise, 2>& b) {
  if constexpr (kPrecise) {  // small terms first
    if constexpr (!kExact) mma_m16n8k8_tf32(d, a.low, b.high);
    mma_m16n8k8_tf32(d, a.high, b.low);
  }
  mma_m16n8k8_tf32(d, a.high, b.high);
}

// Costates a kernel is compiled for; kEither: bf16 or fp16, chosen at run time.
enum class Format : int { kWide, kBFloat, kHalf, kEither };

struct Wide {  // fp32
  static constexpr Format kFormat = Format::kWide;
  static constexpr int kBytes = 4;
  static constexpr bool kExact = false;  // in tf32
  static YOPO_DEVICE float load(const char* at, bool) {
    return bits_float(ld_stream(reinterpret_cast<const uint32_t*>(at)));
  }
  static YOPO_DEVICE void load_pair(const char* at, bool, float& first, float& second) {
    const auto bits = ld_stream(reinterpret_cast<const unsigned long long*>(at));
    first = bits_float(uint32_t(bits)), second = bits_float(uint32_t(bits >> 32));
  }
  static YOPO_DEVICE void store(char* at, bool, float value) {
    st_stream(reinterpret_cast<uint32_t*>(at), float_bits(value));
  }
  static YOPO_DEVICE void store_pair(char* at, bool, float first, float second) {
    st_stream(reinterpret_cast<unsigned long long*>(at),
              float_bits(first) | static_cast<unsigned long long>(float_bits(second)) << 32);
  }
};

template <Format kFormat_>
struct NarrowAs {  // bf16, fp16
  static constexpr Format kFormat = kFormat_;
  static constexpr int kBytes = 2;
  static constexpr bool kExact = true;
  static YOPO_DEVICE bool is_half(bool half) { return kFormat == Format::kEither ? half : kFormat == Format::kHalf; }
  static YOPO_DEVICE float widen(uint16_t bits, bool half) {
    return is_half(half) ? float_from_half(bits) : float_from_bfloat(bits);
  }
  static YOPO_DEVICE uint16_t narrow(float value, bool half) {
    return is_half(half) ? half_from_float(value) : bfloat_from_float(value);
  }
  static YOPO_DEVICE float load(const char* at, bool half) {
    return widen(ld_stream(reinterpret_cast<const uint16_t*>(at)), half);
  }
  static YOPO_DEVICE void load_pair(const char* at, bool half, float& first, float& second) {
    const auto bits = ld_stream(reinterpret_cast<const uint32_t*>(at));
    if constexpr (kFormat == Format::kBFloat) {  // the upper half in place
      first = bits_float(bits << 16), second = bits_float(bits & 0xFFFF0000u);
    } else {
      first = widen(uint16_t(bits), half), second = widen(uint16_t(bits >> 16), half);
    }
  }
  static YOPO_DEVICE void store(char* at, bool half, float value) {
    st_stream(reinterpret_cast<uint16_t*>(at), narrow(value, half));
  }
  static YOPO_DEVICE void store_pair(char* at, bool half, float first, float second) {
    st_stream(reinterpret_cast<uint32_t*>(at), uint32_t(narrow(first, half)) | uint32_t(narrow(second, half)) << 16);
  }
};

using Narrow = NarrowAs<Format::kEither>;
using BFloat = NarrowAs<Format::kBFloat>;
using Half = NarrowAs<Format::kHalf>;

template <Pairs kPairs>
struct PairsAs {};

// One image's costates or outputs, for 2x2 blocks: two adjacent pixels times kernels k, k + 1.
template <class Costate>
struct CostateImage {
  char* base;
  int kernel_stride, row_stride, col_stride;  // in elements; the host checked that an image's offsets fit
  Pairs pairs;
  bool half;

  YOPO_DEVICE char* at(int offset) const { return base + int64_t(offset) * Costate::kBytes; }

  // f(how neighbours are read), with the choice outside f's loops so that their loads are issued together.
  template <class F>
  YOPO_DEVICE void with_pairs(F&& f) const {
    switch (pairs) {
      case Pairs::kPixels:
        return f(PairsAs<Pairs::kPixels>{});
      case Pairs::kKernels:
        return f(PairsAs<Pairs::kKernels>{});
      default:
        return f(PairsAs<Pairs::kNone>{});
    }
  }

  // v[pixel][kernel]; offsets of the two pixels, either of which may lie outside the tile.
  template <Pairs kPairs>
  YOPO_DEVICE void load_block(PairsAs<kPairs>, float (&v)[2][2], int first, int second, bool first_valid,
                              bool second_valid, int k) const {
    const int kernel = k * kernel_stride;
    v[0][0] = v[0][1] = v[1][0] = v[1][1] = 0.0f;
    if constexpr (kPairs == Pairs::kPixels) {  // valid together
      if (first_valid) {
        Costate::load_pair(at(first + kernel), half, v[0][0], v[1][0]);
        Costate::load_pair(at(first + kernel + kernel_stride), half, v[0][1], v[1][1]);
      }
    } else if constexpr (kPairs == Pairs::kKernels) {
      if (first_valid) Costate::load_pair(at(first + kernel), half, v[0][0], v[0][1]);
      if (second_valid) Costate::load_pair(at(second + kernel), half, v[1][0], v[1][1]);
    } else {
      if (first_valid) v[0][0] = Costate::load(at(first + kernel), half);
      if (first_valid) v[0][1] = Costate::load(at(first + kernel + kernel_stride), half);
      if (second_valid) v[1][0] = Costate::load(at(second + kernel), half);
      if (second_valid) v[1][1] = Costate::load(at(second + kernel + kernel_stride), half);
    }
  }

  YOPO_DEVICE void prefetch_block(int first, int second, int k) const {
    const int kernel = k * kernel_stride;
    prefetch(at(first + kernel));
    prefetch(at(pairs == Pairs::kPixels ? first + kernel + kernel_stride : second + kernel));
  }

  template <Pairs kPairs>
  YOPO_DEVICE void store_block(PairsAs<kPairs>, const float (&v)[2][2], int first, int second, bool first_valid,
                               bool second_valid, int k) const {
    const int kernel = k * kernel_stride;
    if constexpr (kPairs == Pairs::kPixels) {
      if (first_valid) {
        Costate::store_pair(at(first + kernel), half, v[0][0], v[1][0]);
        Costate::store_pair(at(first + kernel + kernel_stride), half, v[0][1], v[1][1]);
      }
    } else if constexpr (kPairs == Pairs::kKernels) {
      if (first_valid) Costate::store_pair(at(first + kernel), half, v[0][0], v[0][1]);
      if (second_valid) Costate::store_pair(at(second + kernel), half, v[1][0], v[1][1]);
    } else {
      if (first_valid) Costate::store(at(first + kernel), half, v[0][0]);
      if (first_valid) Costate::store(at(first + kernel + kernel_stride), half, v[0][1]);
      if (second_valid) Costate::store(at(second + kernel), half, v[1][0]);
      if (second_valid) Costate::store(at(second + kernel + kernel_stride), half, v[1][1]);
    }
  }
};

// Activations a kernel is compiled for; kAny decides at run time.
enum class Compiled : int { kIdentity, kRelu, kAny };

template <Compiled kActivation>
YOPO_DEVICE float value_of(Activation any, float z, float negative_slope) {
  if constexpr (kActivation == Compiled::kIdentity) return z;
  if constexpr (kActivation == Compiled::kRelu) return Relu::value(z, negative_slope);
  return activation_value(any, z, negative_slope);
}

template <Compiled kActivation>
YOPO_DEVICE float slope_of(Activation any, float z, float negative_slope) {
  if constexpr (kActivation == Compiled::kIdentity) return 1.0f;
  if constexpr (kActivation == Compiled::kRelu) return Relu::slope(z, negative_slope);
  return activation_slope(any, z, negative_slope);
}

}  // namespace yopo::cuda
