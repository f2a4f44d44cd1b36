// Run-time activation, dtype, precision and geometry to one compiled fused kernel of a row of the tuning table.
#pragma once

#include "cuda/select.h"

namespace yopo::cuda {

// f(traits) for every compiled kernel of a row with this activation.
template <int kRow, Compiled kActivation, class F>
void each_fused_kernel(F&& f) {
  f(FusedTraits<kActivation, Wide, false, kRow, false>{});
  f(FusedTraits<kActivation, Wide, true, kRow, false>{});
  f(FusedTraits<kActivation, Narrow, false, kRow, false>{});
  f(FusedTraits<kActivation, Narrow, true, kRow, false>{});
  // The row's own geometry; who forbids tf32 rarely has narrow costates.
  if constexpr (kActivation != Compiled::kAny) {
    f(FusedTraits<kActivation, Wide, false, kRow, true>{});
    f(FusedTraits<kActivation, Wide, true, kRow, true>{});
    f(FusedTraits<kActivation, BFloat, false, kRow, true>{});
    f(FusedTraits<kActivation, Half, false, kRow, true>{});
  }
}

template <int kRow, class F>
void each_fused_kernel_of_row(F&& f) {
  each_fused_kernel<kRow, Compiled::kIdentity>(f);
  each_fused_kernel<kRow, Compiled::kRelu>(f);
  each_fused_kernel<kRow, Compiled::kAny>(f);
}

inline bool has_geometry(const Params& p, const Geometry& g) {
  return p.channels == g.channels && p.rows == g.rows && p.cols == g.cols && p.stride[0] == g.stride &&
         p.stride[1] == g.stride && p.dilation[0] == 1 && p.dilation[1] == 1;
}

template <int kRow>
Status launch_fused_row(const FusedArgs& args, int blocks, CudaStream stream) {
  const Params& p = args.update.params;
  const Compiled activation = p.activation == Activation::kIdentity ? Compiled::kIdentity
                              : p.activation == Activation::kRelu   ? Compiled::kRelu
                                                                    : Compiled::kAny;
  const bool wide = p.costate_dtype == DType::kFloat32, precise = !p.allow_tf32;
  const bool known = activation != Compiled::kAny && has_geometry(p, kKnownGeometry[kRow]) && (wide || !precise);
  const Format format = wide                                  ? Format::kWide
                        : !known                              ? Format::kEither
                        : p.costate_dtype == DType::kBFloat16 ? Format::kBFloat
                                                              : Format::kHalf;
  Status status{"no fused kernel was compiled for these arguments"};
  each_fused_kernel_of_row<kRow>([&](auto traits) {
    using V = decltype(traits);
    if (V::kActivation == activation && V::Costate::kFormat == format && V::kPrecise == precise && V::kKnown == known)
      status = launch(fused_kernel<V>, args, blocks, V::kThreads, args.plan.shared_bytes, stream);
  });
  return status;
}

template <int kRow>
Status prepare_fused_row() {
  Status status;
  each_fused_kernel_of_row<kRow>([&](auto traits) {
    if (status.ok()) status = prepare(fused_kernel<decltype(traits)>);
  });
  return status;
}

}  // namespace yopo::cuda
