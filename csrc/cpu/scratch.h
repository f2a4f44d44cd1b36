// Layer 1, CPU. Memory for intermediate planes: one growing buffer per thread, so that images allocate nothing.
#pragma once

#include <cstddef>

namespace yopo {

// At least `bytes` of 64-byte aligned memory that belongs to the calling thread until its next call; null if there is
// none.
void* thread_scratch(size_t bytes);

}  // namespace yopo
