// Layer 0. The one place that knows which compiler reads the core headers.
#pragma once

#if defined(__CUDACC__)
#define YOPO_HD __host__ __device__ __forceinline__
#else
// always_inline is not about speed: the same header is compiled for several instruction sets, and an out-of-line copy
// built for the widest one must never be what the linker keeps for all.
#define YOPO_HD __attribute__((always_inline)) inline
#endif
