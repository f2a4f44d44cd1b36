// Layer 0. The one place that knows which compiler reads the core headers.
#pragma once

#if defined(__CUDACC__)
#define YOPO_HD __host__ __device__ __forceinline__
#else
#define YOPO_HD inline
#endif
