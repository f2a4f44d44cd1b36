// Layer 1, CPU. Between the caller's strided tensors and the flat planes the contractions run on.
#pragma once

#include <type_traits>

#include "core/geometry.h"
#include "core/narrow.h"
#include "core/params.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace yopo::YOPO_ISA {

// Where real pixels lie in an input plane: rows [row_begin, row_end), and for row i pixels (h, w0 + j * step) at
// columns [col_begin, col_end).
struct PlaneWindow {
  int64_t row_begin, row_end, col_begin, col_end;
};

YOPO_HD int64_t ceil_div(int64_t n, int64_t d) { return n <= 0 ? 0 : (n + d - 1) / d; }

YOPO_HD PlaneWindow plane_window(const Params& p, int64_t row_stride, int64_t plane_rows, int64_t a, int64_t b) {
  PlaneWindow w;
  w.row_begin = ceil_div(p.padding[0] - a, p.stride[0]);
  w.row_end = ceil_div(p.padding[0] + p.height - a, p.stride[0]);
  w.col_begin = ceil_div(p.padding[1] - b, p.stride[1]);
  w.col_end = ceil_div(p.padding[1] + p.width - b, p.stride[1]);
  if (w.row_end > plane_rows) w.row_end = plane_rows;  // pixels the stride leaves out have no plane element
  if (w.col_end > row_stride) w.col_end = row_stride;
  return w;
}

// A row between two element types. Rows are short: whole vectors, the last one overlapping, beat a library copy.
template <class To, class From>
YOPO_HD void copy_row(const From* __restrict from, To* __restrict to, int64_t count) {
  if constexpr (std::is_same_v<To, From>) {
    constexpr int64_t kStep = kLanes<To>;
    if (count >= kStep) {
      int64_t i = 0;
      for (; i + kStep <= count; i += kStep) store(to + i, load(from + i));
      if (i < count) store(to + count - kStep, load(from + count - kStep));
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(To) > sizeof(From)) {
      to[i] = static_cast<To>(widen(from[i]));
    } else {
      to[i] = narrow<To>(from[i]);
    }
  }
}

// One image [C, H, W] between strided memory and a dense row-major copy.
template <class T>
void gather_image(const Params& p, const T* from, const int64_t* strides, T* to) {
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t h = 0; h < p.height; ++h, to += p.width) {
      const T* row = from + c * strides[1] + h * strides[2];
      if (strides[3] == 1) {
        copy_row(row, to, p.width);
      } else {
        for (int64_t w = 0; w < p.width; ++w) to[w] = row[w * strides[3]];
      }
    }
}

template <class T>
void scatter_image(const Params& p, const T* from, T* to, const int64_t* strides) {
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t h = 0; h < p.height; ++h, from += p.width) {
      T* row = to + c * strides[1] + h * strides[2];
      if (strides[3] == 1) {
        copy_row(from, row, p.width);
      } else {
        for (int64_t w = 0; w < p.width; ++w) row[w * strides[3]] = from[w];
      }
    }
}

// Costate planes of `kernels` channels: out[k][oh * row_stride + ow]; the other columns are left as they are (zero).
template <class T, class P>
void gather_costate(const Params& p, const P* from, const int64_t* strides, int64_t kernels, int64_t row_stride, T* out,
                    int64_t out_stride) {
  int64_t k = 0;
  if (strides[1] == 1 && p.out_width >= kLanes<T>)  // channels_last: whole pixels
    for (; k + kLanes<T> <= kernels; k += kLanes<T>)
      for (int64_t h = 0; h < p.out_height; ++h)
        pixels_to_planes(from + k + h * strides[2], strides[3], p.out_width, out + k * out_stride + h * row_stride,
                         out_stride);
  for (; k < kernels; ++k)
    for (int64_t h = 0; h < p.out_height; ++h) {
      const P* row = from + k * strides[1] + h * strides[2];
      T* to = out + k * out_stride + h * row_stride;
      if (strides[3] == 1) {
        copy_row(row, to, p.out_width);
      } else {
        for (int64_t w = 0; w < p.out_width; ++w) to[w] = static_cast<T>(widen(row[w * strides[3]]));
      }
    }
}

template <class T, class P>
void scatter_output(const Params& p, const T* from, int64_t from_stride, int64_t kernels, int64_t row_stride, P* to,
                    const int64_t* strides) {
  int64_t k = 0;
  if (strides[1] == 1 && p.out_width >= kLanes<T>)  // channels_last: whole pixels
    for (; k + kLanes<T> <= kernels; k += kLanes<T>)
      for (int64_t h = 0; h < p.out_height; ++h)
        planes_to_pixels(from + k * from_stride + h * row_stride, from_stride, p.out_width, to + k + h * strides[2],
                         strides[3]);
  for (; k < kernels; ++k)
    for (int64_t h = 0; h < p.out_height; ++h) {
      P* row = to + k * strides[1] + h * strides[2];
      const T* source = from + k * from_stride + h * row_stride;
      if (strides[3] == 1) {
        copy_row(source, row, p.out_width);
      } else {
        for (int64_t w = 0; w < p.out_width; ++w) row[w * strides[3]] = narrow<P>(source[w]);
      }
    }
}

// Calls f(typed null pointer) for a costate dtype. Usage: with_costate_type(p.costate_dtype, [&](auto* type) { ... });
template <class F>
YOPO_HD void with_costate_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
}

}  // namespace yopo::YOPO_ISA
