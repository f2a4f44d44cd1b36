// Small kernels that are wrong on purpose, and one mma: what the emulation itself is tested with.
#pragma once

#include <string>
#include <vector>

#include "cuda/block_reduce.h"
#include "cuda/primitives.h"

namespace yopo::probe {

struct Nothing {};

inline void diverge(Nothing) {  // half a warp shuffles, the other half multiplies
  using namespace cuda;
  if (lane() < 16) {
    shfl_xor(1.0f, 1);
  } else {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    mma_m16n8k8_tf32(d, a, b);
  }
}

inline void miss_barrier(Nothing) {
  if (cuda::tid() != 7) cuda::sync<99>();
}

inline void leave_warp(Nothing) {
  if (cuda::lane() != 3) cuda::shfl_xor(1.0f, 1);
}

inline void overrun(Nothing) { reinterpret_cast<float*>(cuda::shared_memory())[cuda::tid() == 0 ? 16 : 0] = 1.0f; }

inline void misalign(Nothing) { cuda::store_pair(reinterpret_cast<float*>(cuda::shared_memory()) + 1, 0.0f, 0.0f); }

inline void run(const std::string& name) {
  void (*kernel)(Nothing) = name == "diverge"        ? diverge
                            : name == "miss_barrier" ? miss_barrier
                            : name == "leave_warp"   ? leave_warp
                            : name == "overrun"      ? overrun
                                                     : misalign;
  cuda::prepare(kernel);
  cuda::launch(kernel, Nothing{}, 1, 64, 16 * int(sizeof(float)), nullptr);
}

struct MultiplyArgs {
  const float *a, *b;  // [32][4], [32][2]: what each lane hands in
  float* d;            // [32][4]
};

inline void multiply_kernel(MultiplyArgs args) {
  using namespace cuda;
  float d[4] = {};
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = to_tf32(args.a[lane() * 4 + i]);
  for (int i = 0; i < 2; ++i) b[i] = to_tf32(args.b[lane() * 2 + i]);
  mma_m16n8k8_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) args.d[lane() * 4 + i] = d[i];
}

inline std::vector<float> multiply(const std::vector<float>& a, const std::vector<float>& b) {
  std::vector<float> d(128);
  cuda::prepare(multiply_kernel);
  cuda::launch(multiply_kernel, MultiplyArgs{a.data(), b.data(), d.data()}, 1, 32, 0, nullptr);
  return d;
}

}  // namespace yopo::probe
