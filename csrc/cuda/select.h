// Which kernel runs, in how many blocks, and what it wants of the workspace. Host only.
#pragma once

#include "cuda/fused_kernel.h"
#include "cuda/general_kernel.h"

namespace yopo::cuda {

struct Selection {
  int row = -1;  // of the tuning table; -1: the general kernel
  bool resident = false;
  FusedPlan move{}, results{};  // resident: move is the one plan
  int move_blocks = 0, results_blocks = 0, general_blocks = 0;
  const char* why_general = nullptr;

  bool general() const { return row < 0; }
  int partial_sums() const { return general() ? general_blocks : resident ? move_blocks : results_blocks; }
};

// Byte offsets in the workspace; -1: not wanted.
struct WorkspacePlan {
  int64_t partial = -1, costate_scratch = -1, gradient_scratch = -1, second_eta = -1, constants = -1, bytes = 0;
};

Selection select_kernel(const Params& params, const DeviceLimits& limits);
WorkspacePlan plan_workspace(const Params& params, const Selection& selection);

// The compiled kernels of one row of the tuning table (fused_*.cu).
Status launch_fused_16(const FusedArgs& args, int blocks, CudaStream stream);
Status launch_fused_32(const FusedArgs& args, int blocks, CudaStream stream);
Status launch_fused_160(const FusedArgs& args, int blocks, CudaStream stream);
Status launch_general(const UpdateArgs& args, int blocks, CudaStream stream);
Status launch_reduce(const UpdateArgs& args, CudaStream stream);
// Every compiled kernel resident on the current device, once per device: a launch inside a graph capture may load
// nothing.
Status prepare_device();
Status prepare_fused_16();
Status prepare_fused_32();
Status prepare_fused_160();
Status prepare_general();
Status prepare_patches();
// The constants as a kernel reads them; many per-channel ones go to `workspace` [kConstants, C].
Status prepare_constants(const Params& params, void* workspace, ConstantTable& table, CudaStream stream);

}  // namespace yopo::cuda
