// Layer 1, CPU. Every register-blocking choice, a row per register count with its reason.
#pragma once

#include "cpu/simd.h"

namespace yopo::YOPO_ISA {

struct Blocking {
  int dgrad_accumulators;  // channels x vectors of the input gradient
  int dgrad_rows;          // rows sharing costate vectors where there is one channel, two vectors each
  int forward_kernels;     // output channels at a time ...
  int forward_vectors;     // ... times vectors
  int wgrad_kernels;       // output channels at a time ...
  int wgrad_taps;          // ... times (channel, tap) pairs
};

#if YOPO_REGISTERS == 32
// 24 accumulators leave room for 4 broadcast weights (or 4 costate vectors) and the streamed operand, and cover two
// FMAs a cycle at a latency of 4 three times over; 4 x 6 needs 10 loads for 24 FMAs.
inline constexpr Blocking kBlocking{24, 4, 4, 6, 4, 6};
#else
// 12 of 16 registers accumulate: 3 broadcasts and one streamed operand remain.
inline constexpr Blocking kBlocking{12, 4, 4, 3, 2, 6};
#endif

// Bytes of costate planes worked on at once, so that they stay in the first-level cache between the passes over them.
inline constexpr int64_t kPlaneBudget = 24 * 1024;

// Images whose weight gradients one task sums before it reduces vector lanes: enough to amortise that, few enough to
// leave every thread work. It depends on the batch alone, so results do not depend on the number of threads.
YOPO_HD int64_t images_per_task(int64_t batch) {
  const int64_t wanted = batch / 16;
  return wanted < 1 ? 1 : (wanted > 4 ? 4 : wanted);
}

}  // namespace yopo::YOPO_ISA
