// Host side of the fused kernel: which tile a block takes and where everything lies in its shared memory.
#pragma once

#include "cuda/args.h"
#include "cuda/tuning.h"

namespace yopo::cuda {

enum class FusedMode : int {
  kResident = 0,  // a tile is an image: every step, then the results
  kMove = 1,      // a tile is a band of input rows: one step (affine: all of them)
  kResults = 2,   // a tile is a band of output rows: output and sums at eta'
};

// Which two neighbours of a costate one load may take.
enum class Pairs : int { kNone = 0, kPixels = 1, kKernels = 2 };

struct FusedPlan {
  FusedMode mode;
  int tile_rows, tiles_per_image;
  int u_rows, u_cols, g_rows;  // the largest of any tile; 0: not kept
  // Offsets in floats from the start of shared memory.
  int weight, bias, offsets, constants, sums, u, g, exchange;
  int shared_bytes;
};

YOPO_HD constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct FusedShape {  // what the plan depends on
  int channels, height, width, kernels, out_height, out_width, rows, cols;
  int stride, padding_h, dilation_h, dilation_w;
  bool affine, want_sums, want_output;
};

constexpr FusedPlan plan_tile(const FusedShape& s, const TuningRow& row, FusedMode mode, int tile_rows) {
  FusedPlan p{};
  p.mode = mode;
  p.tile_rows = tile_rows;
  const int extent = (s.rows - 1) * s.dilation_h;
  const int all_rows = mode == FusedMode::kResults ? s.out_height : s.height;
  p.tiles_per_image = (all_rows + tile_rows - 1) / tile_rows;
  int out_rows = mode == FusedMode::kMove ? (tile_rows - 1 + extent) / s.stride + 1 : tile_rows;
  if (mode == FusedMode::kResident || out_rows > s.out_height) out_rows = s.out_height;
  const bool moves = mode != FusedMode::kResults, results = mode != FusedMode::kMove && (s.want_sums || s.want_output);
  if (results || !s.affine) {
    p.u_rows = (out_rows - 1) * s.stride + extent + 1;
    p.u_cols = (s.out_width - 1) * s.stride + (s.cols - 1) * s.dilation_w + 1;
  }
  p.g_rows = moves ? tile_rows : 0;
  int at = 0;
  p.weight = at, at += round_up(s.kernels * row.weight_stride(), 32);
  p.bias = at, at += round_up(s.kernels, 32);
  p.offsets = at, at += round_up(row.columns(), 32);
  p.constants = at, at += round_up(kConstants * s.channels, 32);
  const int used_columns = s.channels * s.rows * s.cols;
  p.sums = at, at += results && s.want_sums ? round_up(s.kernels * (used_columns + 1), 32) : 0;
  p.u = at, at += round_up(s.channels * p.u_rows * p.u_cols, 32);
  p.g = at, at += round_up(s.channels * p.g_rows * s.width, 32);
  p.exchange = at, at += moves ? row.band_buffers * round_up(used_columns * row.band_stride(), 32) : 0;
  p.shared_bytes = at * int(sizeof(float));
  return p;
}

// The largest tile of rows that fits `limit` bytes, 0 rows if none does.
constexpr FusedPlan plan_band(const FusedShape& s, const TuningRow& row, FusedMode mode, int limit) {
  const int all_rows = mode == FusedMode::kResults ? s.out_height : s.height;
  for (int rows = all_rows < 32 ? all_rows : 32; rows > 0; --rows) {
    const FusedPlan p = plan_tile(s, row, mode, rows);
    if (p.shared_bytes <= limit) return p;
  }
  return FusedPlan{};
}

// The CIFAR stem at its fullest, non-linear, within 99 KB.
constexpr FusedShape kCifarStem{3, 32, 32, 64, 32, 32, 3, 3, 1, 1, 1, 1, false, true, true};
static_assert(plan_tile(kCifarStem, kTuningTable[1], FusedMode::kResident, 32).shared_bytes <= 99 * 1024);
// The MNIST layer with room for two blocks; the ImageNet stem in bands, within 99 KB.
constexpr FusedShape kMnistLayer{1, 28, 28, 32, 26, 26, 3, 3, 1, 0, 1, 1, false, true, true};
static_assert(plan_tile(kMnistLayer, kTuningTable[0], FusedMode::kResident, 28).shared_bytes <= 48 * 1024);
constexpr FusedShape kImageNetStem{3, 224, 224, 64, 112, 112, 7, 7, 2, 3, 1, 1, true, true, true};
static_assert(plan_band(kImageNetStem, kTuningTable[2], FusedMode::kMove, 99 * 1024).tile_rows >= 4);
static_assert(plan_band(kImageNetStem, kTuningTable[2], FusedMode::kResults, 99 * 1024).tile_rows >= 1);

}  // namespace yopo::cuda
