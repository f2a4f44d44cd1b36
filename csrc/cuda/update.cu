// The launches of one first-layer update, in order.
#include <cstdio>
#include <mutex>
#include <set>

#include "cuda/select.h"

namespace yopo {
namespace cuda {
namespace {

// Whether neighbours along `axis` may be read with one load for the costate (or output) at `data`.
Pairs pairs_of(const Params& p, const void* data, const int64_t (&strides)[4], bool whole_images) {
  const int64_t bytes = p.costate_dtype == DType::kFloat32 ? 4 : 2;
  auto even = [](int64_t v) { return v % 2 == 0; };
  if (data == nullptr || reinterpret_cast<uintptr_t>(data) % (2 * bytes) != 0 || (!even(strides[0]) && p.batch > 1))
    return Pairs::kNone;
  const bool flat = strides[3] == 1 && strides[2] == p.out_width;
  const bool even_pixels = even(p.out_width) || (whole_images && even(p.out_height * p.out_width));
  if (flat && even_pixels && even(strides[1])) return Pairs::kPixels;
  if (strides[1] == 1 && even(strides[2]) && even(strides[3])) return Pairs::kKernels;
  return Pairs::kNone;
}

Status launch_fused(const Selection& s, const FusedArgs& args, int blocks, CudaStream stream) {
  switch (s.row) {
    case 0:
      return launch_fused_16(args, blocks, stream);
    case 1:
      return launch_fused_32(args, blocks, stream);
    default:
      return launch_fused_160(args, blocks, stream);
  }
}

void copy_strides(int64_t (&to)[4], const int64_t (&from)[4]) {
  for (int i = 0; i < 4; ++i) to[i] = from[i];
}

Status run_fused(const Selection& s, const UpdateArgs& update, float* second_eta, CudaStream stream) {
  const Params& p = update.params;
  FusedArgs a{};
  a.update = update;
  a.plan = s.move;
  a.out_width_reciprocal = uint32_t(((uint64_t(1) << 32) + p.out_width - 1) / p.out_width);
  a.costate_pairs = pairs_of(p, p.costate, p.costate_strides, s.resident);
  a.output_pairs = pairs_of(p, p.output, p.output_strides, s.resident);
  // 1) eta moves: in one launch, or (a non-linear f0 in bands, which see their neighbours' eta) one per step, in turn
  // between two buffers so that the last step lands in eta_out.
  const bool together = s.resident || p.affine() || p.steps <= 1;
  const int launches = together ? 1 : int(p.steps);
  const float* from = static_cast<const float*>(p.eta);
  copy_strides(a.eta_from_strides, p.eta_strides);
  for (int i = 0; i < launches; ++i) {
    const bool into_result = (launches - 1 - i) % 2 == 0;
    a.eta_from = from;
    a.eta_to = into_result ? static_cast<float*>(p.eta_out) : second_eta;
    const int64_t dense[4] = {p.channels * p.height * p.width, p.height * p.width, p.width, 1};
    copy_strides(a.eta_to_strides, into_result ? p.eta_out_strides : dense);
    a.first = i == 0;
    a.steps = together ? int(p.steps) : 1;
    const Status status = launch_fused(s, a, s.move_blocks, stream);
    if (!status.ok()) return status;
    from = a.eta_to;
    copy_strides(a.eta_from_strides, a.eta_to_strides);
  }
  // 2) the results at eta', unless they came along
  if (s.resident || s.results_blocks == 0) return {};
  a.plan = s.results;
  a.eta_from = from;
  return launch_fused(s, a, s.results_blocks, stream);
}

}  // namespace

Status prepare_device() {
  static std::mutex mutex;
  static std::set<int> prepared;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  if (prepared.count(device) != 0) return {};
  const RelaxedCapture relaxed;  // a graph capture that has begun permits no loading otherwise
  for (Status (*part)() : {prepare_fused_16, prepare_fused_32, prepare_fused_160, prepare_general, prepare_patches}) {
    const Status status = part();
    if (!status.ok()) return status;
  }
  prepared.insert(device);
  return {};
}

}  // namespace cuda

int64_t first_layer_update_cuda_workspace(const Params& params) {
  using namespace cuda;
  return plan_workspace(params, select_kernel(params, device_limits())).bytes;
}

Status first_layer_update_cuda(const Params& params, void* workspace, CudaStream stream) {
  using namespace cuda;
  const Selection selection = select_kernel(params, device_limits());
  const WorkspacePlan plan = plan_workspace(params, selection);
  auto at = [&](int64_t offset) {
    return offset < 0 ? nullptr : static_cast<void*>(static_cast<char*>(workspace) + offset);
  };
  Status status = prepare_device();
  if (!status.ok()) return status;
  UpdateArgs args{};
  args.params = params;
  args.partial = {at(plan.partial), selection.partial_sums(),
                  int(params.channels / params.groups * params.rows * params.cols)};
  args.costate_scratch = at(plan.costate_scratch);
  args.gradient_scratch = at(plan.gradient_scratch);
  status = prepare_constants(params, at(plan.constants), args.constants, stream);
  if (!status.ok()) return status;
  status = selection.general() ? launch_general(args, selection.general_blocks, stream)
                               : run_fused(selection, args, static_cast<float*>(at(plan.second_eta)), stream);
  if (!status.ok() || plan.partial < 0) return status;
  return launch_reduce(args, stream);
}

const char* cuda_variant(const Params& params) {
  using namespace cuda;
  thread_local char text[192];
  const Selection s = select_kernel(params, device_limits());
  if (s.general()) {
    std::snprintf(text, sizeof(text), "general (%s)", s.why_general);
  } else {
    std::snprintf(text, sizeof(text), "fused %s, %s, %s", kTuningTable[s.row].name, s.resident ? "one launch" : "bands",
                  params.allow_tf32 ? "tf32" : "3 x tf32");
  }
  return text;
}

}  // namespace yopo
