// Layer 0. A convolution of any stride, padding and dilation as stride-1 arithmetic on flat planes.
//
// The padded input is split into stride[0] x stride[1] phase planes: plane (a, b) holds the padded pixels (i *
// stride[0] + a, j * stride[1] + b) at flat index i * row_stride + j. The output uses the same row_stride, so tap (r,
// s) reads, for the output at flat index q, its plane at q + offset: one constant per tap and no rows in the inner
// loops. Columns of the output plane beyond out_width exist only to make that true; they must hold zeros wherever
// gradients are summed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/params.h"

namespace yopo {

struct Tap {
  int64_t r, s;    // position in the kernel
  int64_t phase;   // index of its plane
  int64_t offset;  // in its plane, >= 0
};

struct Phase {
  int64_t a, b;       // (row, column) modulo the stride
  int64_t tap_begin;  // its taps: [tap_begin, tap_end) of Geometry::taps
  int64_t tap_end;
};

struct Geometry {
  int64_t row_stride;         // of every plane
  int64_t plane_rows;         // of an input plane
  int64_t out_size;           // out_height * row_stride
  int64_t halo;               // the largest offset
  std::vector<Tap> taps;      // sorted by phase
  std::vector<Phase> phases;  // only those some tap reads

  explicit Geometry(const Params& p) {
    int64_t last_row = 0, last_col = 0;
    for (int64_t a = 0; a < p.stride[0]; ++a)
      for (int64_t b = 0; b < p.stride[1]; ++b) {
        const auto begin = static_cast<int64_t>(taps.size());
        for (int64_t r = 0; r < p.rows; ++r)
          for (int64_t s = 0; s < p.cols; ++s)
            if (r * p.dilation[0] % p.stride[0] == a && s * p.dilation[1] % p.stride[1] == b)
              taps.push_back({r, s, static_cast<int64_t>(phases.size()), 0});
        if (static_cast<int64_t>(taps.size()) > begin)
          phases.push_back({a, b, begin, static_cast<int64_t>(taps.size())});
      }
    for (const Tap& t : taps) {
      last_row = std::max(last_row, t.r * p.dilation[0] / p.stride[0]);
      last_col = std::max(last_col, t.s * p.dilation[1] / p.stride[1]);
    }
    row_stride = p.out_width + last_col;
    plane_rows = p.out_height + last_row;
    out_size = p.out_height * row_stride;
    halo = last_row * row_stride + last_col;
    for (Tap& t : taps) t.offset = t.r * p.dilation[0] / p.stride[0] * row_stride + t.s * p.dilation[1] / p.stride[1];
  }
};

}  // namespace yopo
