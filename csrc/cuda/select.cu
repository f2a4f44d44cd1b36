#include <algorithm>
#include <cstdlib>

#include "cuda/select.h"

namespace yopo::cuda {
namespace {

constexpr int kReservedBytes = 1024;                   // of shared memory, per block, taken by the system
constexpr int64_t kPartialBudget = int64_t(64) << 20;  // bytes of partial sums a launch may spread over its blocks
constexpr int64_t kScratchBudget = int64_t(512) << 20;

bool wants_sums(const Params& p) {
  return p.grad_weight != nullptr || p.grad_bias != nullptr || p.grad_scale != nullptr || p.grad_shift != nullptr;
}

int64_t columns_of(const Params& p) { return p.channels / p.groups * p.rows * p.cols; }

// Elements of one image, as far as an int must reach.
int64_t span(const int64_t (&strides)[4], int64_t channels, int64_t height, int64_t width) {
  return std::abs(strides[1]) * channels + std::abs(strides[2]) * height + std::abs(strides[3]) * width;
}
int64_t costate_span(const int64_t (&strides)[4], const Params& p) {
  return span(strides, p.kernels, p.out_height, p.out_width);
}
int64_t input_span(const Params& p) {
  return std::max({span(p.x_strides, p.channels, p.height, p.width), span(p.eta_strides, p.channels, p.height, p.width),
                   span(p.eta_out_strides, p.channels, p.height, p.width)});
}

const char* why_no_fused_kernel(const Params& p) {
  constexpr int64_t kIntMax = 0x7FFFFFFF;
  if (p.compute != DType::kFloat32) return "x is not float32";
  if (p.costate_dtype == DType::kFloat64) return "the costate is float64";
  if (p.norm != Norm::kLinf) return "the norm is L2";
  if (p.groups != 1) return "the convolution has groups";
  if (p.stride[0] != p.stride[1] || p.stride[0] > 2) return "the stride is neither 1 nor 2";
  if (p.kernels % 16 != 0) return "the number of output channels is no multiple of 16";
  if (columns_of(p) + 1 > kTuningTable[kTuningRows - 1].columns()) return "channels x kernel size is too large";
  if (p.out_width < 2 || p.out_width > 4096 || p.out_height * p.out_width * p.out_width > kIntMax)
    return "the output size is out of range";
  if (p.channels * p.height * p.width > kIntMax || p.batch * p.height > kIntMax || input_span(p) > kIntMax)
    return "the input is too large";
  if (costate_span(p.costate_strides, p) > kIntMax || (p.output && costate_span(p.output_strides, p) > kIntMax))
    return "an image's costate is too large";
  return nullptr;
}

int blocks_at_once(const FusedPlan& plan, const TuningRow& row, const DeviceLimits& limits) {
  const int fitting = limits.shared_bytes_per_processor / (plan.shared_bytes + kReservedBytes);
  return limits.processors * std::max(1, std::min(row.blocks_per_processor, fitting));
}

// Enough blocks to fill the device, few enough to keep the partial sums small.
int blocks_for(const Params& p, const FusedPlan& plan, const TuningRow& row, const DeviceLimits& limits) {
  const int64_t tiles = p.batch * plan.tiles_per_image;
  return int(std::min<int64_t>(tiles, blocks_at_once(plan, row, limits)));
}

}  // namespace

Selection select_kernel(const Params& p, const DeviceLimits& limits) {
  Selection s;
  s.why_general = why_no_fused_kernel(p);
  if (s.why_general == nullptr) {
    const FusedShape shape{int(p.channels),    int(p.height),      int(p.width), int(p.kernels),   int(p.out_height),
                           int(p.out_width),   int(p.rows),        int(p.cols),  int(p.stride[0]), int(p.padding[0]),
                           int(p.dilation[0]), int(p.dilation[1]), p.affine(),   wants_sums(p),    p.output != nullptr};
    int row = 0;
    while (kTuningTable[row].columns() < columns_of(p) + 1) ++row;
    const TuningRow& tuning = kTuningTable[row];
    const int limit = limits.shared_bytes_per_block;
    const int shared_by_two = std::min(limit, limits.shared_bytes_per_processor / 2 - kReservedBytes);
    s.move = plan_tile(shape, tuning, FusedMode::kResident, shape.height);
    s.resident = s.move.shared_bytes <= limit;
    const bool results = wants_sums(p) || p.output != nullptr;
    bool fits = s.resident;
    if (!s.resident) {  // bands; two blocks to a processor unless that leaves thin ones
      s.move = plan_band(shape, tuning, FusedMode::kMove, shared_by_two);
      if (s.move.tile_rows < 8) s.move = plan_band(shape, tuning, FusedMode::kMove, limit);
      if (results) {
        s.results = plan_band(shape, tuning, FusedMode::kResults, shared_by_two);
        if (s.results.tile_rows < 4) s.results = plan_band(shape, tuning, FusedMode::kResults, limit);
      }
      fits = s.move.tile_rows > 0 && (!results || s.results.tile_rows > 0);
    }
    if (fits) {
      s.row = row;
      s.move_blocks = blocks_for(p, s.move, tuning, limits);
      if (!s.resident && results) s.results_blocks = blocks_for(p, s.results, tuning, limits);
      return s;
    }
    s.why_general = "a band of the image does not fit in shared memory";
    s.resident = false;
  }
  // The general kernel: an image per block at a time, within the workspace's budget.
  const int64_t element = p.compute == DType::kFloat64 ? 8 : 4;
  const int64_t partial = wants_sums(p) ? p.kernels * (columns_of(p) + 1) * element : 1;
  const int64_t scratch = element * (p.kernels * p.out_height * p.out_width + p.channels * p.height * p.width) + 1;
  int64_t blocks = std::min<int64_t>(p.batch, int64_t(limits.processors) * 8);
  blocks = std::min(
      {blocks, std::max<int64_t>(1, kPartialBudget / partial), std::max<int64_t>(1, kScratchBudget / scratch)});
  s.general_blocks = int(blocks);
  return s;
}

WorkspacePlan plan_workspace(const Params& p, const Selection& s) {
  WorkspacePlan w;
  const int64_t element = p.compute == DType::kFloat64 ? 8 : 4;
  auto take = [&w](int64_t bytes) {
    const int64_t at = w.bytes;
    w.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  if (wants_sums(p)) w.partial = take(s.partial_sums() * p.kernels * (columns_of(p) + 1) * element);
  if (s.general()) {
    if (!p.affine()) w.costate_scratch = take(s.general_blocks * p.kernels * p.out_height * p.out_width * element);
    if (p.norm == Norm::kL2) w.gradient_scratch = take(s.general_blocks * p.channels * p.height * p.width * element);
  } else if (!s.resident && !p.affine() && p.steps > 1) {
    w.second_eta = take(p.batch * p.channels * p.height * p.width * element);
  }
  if (p.channels > ConstantTable::kInline) w.constants = take(kConstants * p.channels * int64_t(sizeof(double)));
  return w;
}

}  // namespace yopo::cuda
