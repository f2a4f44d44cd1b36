// Layer 1, CPU. What each instruction set's kernel exports to the dispatcher.
#pragma once

#include "core/geometry.h"
#include "launch.h"

namespace yopo {

using SharedBuffer = void* (*)(size_t bytes);  // memory for one call, freed by the dispatcher; null if there is none

#define YOPO_DECLARE_KERNEL(isa)                                                                    \
  namespace isa {                                                                                   \
  Status first_layer_update(const Params& params, const Geometry& geometry, const ThreadPool& pool, \
                            SharedBuffer buffer);                                                   \
  }
YOPO_DECLARE_KERNEL(baseline)
YOPO_DECLARE_KERNEL(avx2)
YOPO_DECLARE_KERNEL(avx512)
#undef YOPO_DECLARE_KERNEL

}  // namespace yopo
