// The seam between the kernels (layer 1) and the torch glue (layer 2): raw pointers in, a status out, no exceptions.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace yopo {

struct Status {
  const char* error = nullptr;  // static text; null: success
  bool ok() const { return error == nullptr; }
};

// How the CPU kernels reach the caller's thread pool: run body(begin, end, context) over [0, tasks).
struct ThreadPool {
  void (*parallel_for)(int64_t tasks, void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

Status first_layer_update_cpu(const Params& params, const ThreadPool& pool);
const char* cpu_isa();  // the instruction set chosen for this processor: "avx512", "avx2", "baseline"

using CudaStream = void*;  // a cudaStream_t; this header is free of CUDA

// Bytes of device memory the launch wants for its partial sums of weight gradients.
int64_t first_layer_update_cuda_workspace(const Params& params);
Status first_layer_update_cuda(const Params& params, void* workspace, CudaStream stream);
const char* cuda_variant(const Params& params);  // the row of the tuning table that would run

// Patch embeddings (kernel == stride, large): matrix products that layer 2 leaves to the library, and the kernels
// between them, over matrices that are contiguous and of one dtype, except the costate's sums, which are fp32.
struct PatchMatrices {
  DType dtype;
  void* weight;              // [K, C * R * S]
  const void* gradient;      // [B * OH * OW, C * R * S]
  void* patches;             // the same; null: not wanted
  const void* product;       // [B * OH * OW, K]
  const void* weight_sums;   // [K, C * R * S]
  const void* costate_sums;  // [K]
};

// Whether these parameters are better served by matrix products than by the kernels.
bool takes_patches(const Params& params);
int64_t patch_workspace(const Params& params);  // bytes

Status patch_weight(const Params& params, const PatchMatrices& matrices, CudaStream stream);
Status patch_step(const Params& params, const PatchMatrices& matrices, void* workspace, CudaStream stream);
Status patch_output(const Params& params, const PatchMatrices& matrices, CudaStream stream);
Status patch_sums(const Params& params, const PatchMatrices& matrices, void* workspace, CudaStream stream);

}  // namespace yopo
