// Layer 1, CPU. Chooses the instruction set at run time; owns the memory.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/kernel.h"
#include "cpu/scratch.h"

namespace yopo {

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(size_t bytes) { return Buffer(std::aligned_alloc(64, (bytes + 127) / 64 * 64)); }

struct Isa {
  const char* name;
  decltype(&baseline::first_layer_update) kernel;
};

// The widest that this processor runs; YOPO_EXT_ISA names another one (for tests and measurements).
Isa choose_isa() {
  const char* forced = std::getenv("YOPO_EXT_ISA");
  [[maybe_unused]] const auto allowed = [&](const char* name) {
    return forced == nullptr || std::strcmp(forced, name) == 0;
  };
#if defined(YOPO_HAVE_AVX512)
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return {"avx512", avx512::first_layer_update};
#endif
#if defined(YOPO_HAVE_AVX2)
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", avx2::first_layer_update};
#endif
  return {"baseline", baseline::first_layer_update};
}

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

thread_local Buffer call_buffer;  // alive during one call of first_layer_update_cpu

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local Buffer buffer;
  thread_local size_t size = 0;
  if (bytes > size) {
    buffer.reset();
    buffer = allocate(bytes);
    size = buffer != nullptr ? bytes : 0;
  }
  return buffer.get();
}

Status first_layer_update_cpu(const Params& params, const ThreadPool& pool) {
  const Geometry geometry(params);
  const Status status = isa().kernel(params, geometry, pool, [](size_t bytes) {
    call_buffer = allocate(bytes);
    return call_buffer.get();
  });
  call_buffer.reset();
  return status;
}

const char* cpu_isa() { return isa().name; }

}  // namespace yopo
