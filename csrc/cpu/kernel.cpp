// Layer 1, CPU. One instruction set's kernel; CMakeLists.txt compiles this file once per row of its table.
#include "cpu/kernel.h"

#include <type_traits>

#include "cpu/scratch.h"
#include "cpu/update.h"

namespace yopo::YOPO_ISA {

namespace {

template <class T>
Status update(const Params& params, const Geometry& geometry, const ThreadPool& pool, SharedBuffer buffer) {
  Arena counter(nullptr);
  const size_t shared = (Update<T>(params, geometry, counter), counter.used());
  Arena arena(buffer(shared));
  if (shared > 0 && arena.take<char>(0) == nullptr) return {"out of memory"};
  Update<T> job(params, geometry, arena);
  job.prepare();
  struct Context {
    const Update<T>* job;
    bool failed;
  } context{&job, false};
  pool.parallel_for(
      job.tasks(),
      [](int64_t begin, int64_t end, void* opaque) {
        auto* context = static_cast<Context*>(opaque);
        void* scratch = thread_scratch(context->job->scratch_bytes());
        if (scratch == nullptr) {
          __atomic_store_n(&context->failed, true, __ATOMIC_RELAXED);
          return;
        }
        context->job->run(begin, end, scratch);
      },
      &context);
  if (context.failed) return {"out of memory"};
  job.finish();
  return {};
}

}  // namespace

Status first_layer_update(const Params& params, const Geometry& geometry, const ThreadPool& pool, SharedBuffer buffer) {
  return params.compute == DType::kFloat64 ? update<double>(params, geometry, pool, buffer)
                                           : update<float>(params, geometry, pool, buffer);
}

}  // namespace yopo::YOPO_ISA
