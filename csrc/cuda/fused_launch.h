// Run-time activation, dtype and precision to one compiled fused kernel of a row of the tuning table.
#pragma once

#include <type_traits>

#include "cuda/select.h"

namespace yopo::cuda {

template <int kRow, Compiled kActivation>
Status launch_fused_as(const FusedArgs& args, int blocks, CudaStream stream) {
  const Params& p = args.update.params;
  auto run = [&](auto costate, auto precise) {
    using Traits = FusedTraits<kActivation, decltype(costate), decltype(precise)::value, kRow>;
    return launch(fused_kernel<Traits>, args, blocks, Traits::kThreads, args.plan.shared_bytes, stream);
  };
  const bool wide = p.costate_dtype == DType::kFloat32;
  if (p.allow_tf32) return wide ? run(Wide{}, std::false_type{}) : run(Narrow{}, std::false_type{});
  return wide ? run(Wide{}, std::true_type{}) : run(Narrow{}, std::true_type{});
}

template <int kRow>
Status launch_fused_row(const FusedArgs& args, int blocks, CudaStream stream) {
  switch (args.update.params.activation) {
    case Activation::kIdentity:
      return launch_fused_as<kRow, Compiled::kIdentity>(args, blocks, stream);
    case Activation::kRelu:
      return launch_fused_as<kRow, Compiled::kRelu>(args, blocks, stream);
    default:
      return launch_fused_as<kRow, Compiled::kAny>(args, blocks, stream);
  }
}

}  // namespace yopo::cuda
