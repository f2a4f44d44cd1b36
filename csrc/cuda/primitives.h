// Every cooperative primitive the kernels use, and how a kernel is launched. Two implementations of the same names: the
// device's here, the CPU's in emulation/primitives.h, so that tests execute the kernels' own source without a GPU.
#pragma once

#if defined(YOPO_EMULATED)
#include "emulation/primitives.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

#define YOPO_DEVICE __device__ __forceinline__

namespace yopo::cuda {

YOPO_DEVICE int tid() { return threadIdx.x; }
YOPO_DEVICE int size() { return blockDim.x; }
YOPO_DEVICE int block() { return blockIdx.x; }
YOPO_DEVICE int blocks() { return gridDim.x; }
YOPO_DEVICE int lane() { return threadIdx.x % 32; }
YOPO_DEVICE int warp() { return threadIdx.x / 32; }

extern __shared__ __align__(128) char yopo_shared_memory[];
YOPO_DEVICE char* shared_memory() { return yopo_shared_memory; }

// Barriers are numbered so that tests can take one out of the emulated kernels and see it missed.
template <int kSite>
YOPO_DEVICE void sync() {
  __syncthreads();
}

YOPO_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

template <class T>
YOPO_DEVICE T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// An operand of mma, which leaves out the low 13 bits: half of their range is added, so that what is left is rounded to
// nearest. NaN and infinity stay: adding would carry the device's NaN, 0x7FFFFFFF, into the sign.
YOPO_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits = __float_as_uint(value);
  asm("{ .reg .pred finite; .reg .f32 size;\n"
      "abs.f32 size, %1;\n"
      "setp.lt.f32 finite, size, 0f7F800000;\n"
      "@finite add.u32 %0, %0, 0x1000; }"
      : "+r"(bits)
      : "f"(value));
  return bits;
}

YOPO_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
YOPO_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// d += A (16x8, row) * B (8x8, col), one warp. volatile: must not sink into a branch that only some lanes take.
YOPO_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
YOPO_DEVICE T ld_stream(const T* address) {
  return __ldg(address);
}

template <class T>
YOPO_DEVICE void st_stream(T* address, T value) {
  __stcs(address, value);
}

YOPO_DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

YOPO_DEVICE void store_pair(float* address, float first, float second) {  // shared memory, 8-byte aligned
  *reinterpret_cast<float2*>(address) = make_float2(first, second);
}

YOPO_DEVICE uint16_t half_from_float(float value) { return __half_as_ushort(__float2half_rn(value)); }
YOPO_DEVICE float float_from_half(uint16_t half) { return __half2float(__ushort_as_half(half)); }

// ---- launching ----

struct DeviceLimits {
  int shared_bytes_per_block, shared_bytes_per_processor, processors;
};

inline DeviceLimits device_limits() {  // of the current device; attributes are cached by the runtime
  int device = 0;
  DeviceLimits limits{48 * 1024, 48 * 1024, 1};
  if (cudaGetDevice(&device) != cudaSuccess) return limits;
  cudaDeviceGetAttribute(&limits.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&limits.shared_bytes_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device);
  return limits;
}

inline int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

// While one lives, this thread may make calls that a graph capture would otherwise forbid.
struct RelaxedCapture {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

// Loads a kernel onto the current device and lets it have all the shared memory that a block may opt in to.
template <class Args>
inline Status prepare(void (*kernel)(Args)) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes;
  cudaError_t e = cudaFuncGetAttributes(&attributes, function);
  if (e == cudaSuccess)
    e = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             device_limits().shared_bytes_per_block - int(attributes.sharedSizeBytes));
  return {e == cudaSuccess ? nullptr : cudaGetErrorString(e)};
}

// The kernel is prepared.
template <class Args>
inline Status launch(void (*kernel)(Args), const Args& args, int blocks, int threads, int shared_bytes,
                     CudaStream stream) {
  void* arguments[] = {const_cast<Args*>(&args)};
  const cudaError_t e =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)),
                       arguments, size_t(shared_bytes), static_cast<cudaStream_t>(stream));
  return {e == cudaSuccess ? nullptr : cudaGetErrorString(e)};
}

}  // namespace yopo::cuda

#endif
