// The one table of fast variants: what each takes and why it is shaped so. `choose_row` picks the first that fits.
#pragma once

#include "core/macros.h"

namespace yopo::cuda {

struct TuningRow {
  const char* name;
  int threads;
  int tiles;         // n-tiles of 8 columns: takes C * R * S + 1 <= 8 * tiles
  int result_tiles;  // m-tiles of 16 kernels a warp keeps while it computes outputs and sums
  int band_pixels;   // pixels whose T = q W is exchanged at a time
  int band_buffers;  // 2: one barrier a band instead of two
  int blocks_per_processor;
  int chunk;  // k-steps of 8 kernels whose costates a thread holds at once
  const char* reason;

  YOPO_HD constexpr int warps() const { return threads / 32; }
  YOPO_HD constexpr int columns() const { return 8 * tiles; }
  YOPO_HD constexpr int weight_stride() const {
    return columns() + 4;
  }  // 4 mod 32 (tiles = 4): fragment loads free of conflicts
  YOPO_HD constexpr int band_stride() const { return band_pixels + 4; }  // 4 mod 16: likewise for the exchange
};

constexpr TuningRow kTuningTable[] = {
    {"16 columns", 256, 2, 2, 128, 2, 2, 8,
     "1 input channel, 3x3 (MNIST): half the multiplications of 32 columns; 16 pixels per warp and band; an image's "
     "costate is small enough (87 KB) for two blocks a processor to find it in L2 again"},
    {"32 columns", 512, 4, 2, 256, 1, 1, 8,
     "3 input channels, 3x3 (CIFAR), 1x5x5: 27 of 32 columns used. One block of 16 warps a processor rather than two "
     "of "
     "8: 132 images' costates (256 KB each) stay in a 50 MB L2 between their readings, 264 would not; 75 KB fit 99 KB; "
     "32 costates and 16 accumulators, or 32 sums, per thread stay under 128 registers"},
    {"160 columns", 256, 20, 1, 64, 1, 1, 4,
     "7x7x3 (ImageNet), 5x5x3: the exchange of 64 pixels takes 41 KB, the weights 42 KB, so one block fits 99 KB; 80 "
     "accumulators leave registers for 32 kernels' costates"},
};
// The geometry that a row has kernels of its own for: sizes and padding are free, dilation is 1.
struct Geometry {
  int channels, rows, cols, stride;
};
constexpr Geometry kKnownGeometry[] = {{1, 3, 3, 1}, {3, 3, 3, 1}, {3, 7, 7, 2}};
constexpr int kTuningRows = sizeof(kTuningTable) / sizeof(kTuningTable[0]);
static_assert(sizeof(kKnownGeometry) / sizeof(kKnownGeometry[0]) == kTuningRows);

}  // namespace yopo::cuda
