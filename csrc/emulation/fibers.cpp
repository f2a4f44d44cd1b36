#include "emulation/fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" {
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_destroy_fiber(void* fiber) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_acquire(void* address) __attribute__((weak));
void __tsan_release(void* address) __attribute__((weak));
}

namespace yopo::emulation {
namespace {

constexpr int kWarp = 32;
constexpr int kSlotBytes = 64;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xFF;  // a NaN in every floating type
constexpr unsigned kTsanNoSync = 1;

// ---- switching stacks ----

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void yopo_switch_stack(void** save, void* load);
asm(R"(
.text
.type yopo_switch_stack, @function
yopo_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size yopo_switch_stack, .-yopo_switch_stack
)");

void switch_context(Context& from, Context& to) { yopo_switch_stack(&from.stack_pointer, to.stack_pointer); }

void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;                              // keeps the stack aligned at entry
  *--top = reinterpret_cast<void*>(entry);       // popped by ret
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // callee-saved registers
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t context;
};

void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

// ---- one block ----

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* tsan = nullptr;
  State state = State::kDone;
};

struct Warp {
  int arrived = 0;
  int operation = 0;
  int generation = 0;
  alignas(16) char slots[2][kWarp][kSlotBytes];
};

struct Machine {
  Schedule schedule = Schedule::kForward;
  std::mt19937_64 random;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  Context scheduler;
  void* scheduler_tsan = nullptr;
  int removed_barrier = 0;
  int current = -1, threads = 0, block = 0, blocks = 0, at_barrier = 0;
  int barrier_generation = 0;
  char begin = 0, end = 0;  // addresses for ThreadSanitizer, like the next
  char barriers[2] = {};    // two, lest a waking thread acquire what others release at the barrier after
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;
  void (*body)(void*) = nullptr;
  void* body_context = nullptr;
  std::string error;
};

Machine& machine() {
  static Machine m;
  return m;
}

void copy_plain(char* to, const char* from, int bytes) {  // not memcpy: ThreadSanitizer would see it
  for (int i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = from[i];
}

void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

void to_scheduler() {
  Machine& m = machine();
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(m.scheduler_tsan, kTsanNoSync);
  switch_context(m.fibers[m.current].context, m.scheduler);
}

void fiber_entry() {
  Machine& m = machine();
  acquire(&m.begin);
  m.body(m.body_context);
  release(&m.end);
  m.fibers[m.current].state = State::kDone;
  to_scheduler();
}

std::string describe_stall() {
  Machine& m = machine();
  int barrier = 0, warp = 0, done = 0;
  for (int i = 0; i < m.threads; ++i) {
    barrier += m.fibers[i].state == State::kAtBarrier;
    warp += m.fibers[i].state == State::kAtWarp;
    done += m.fibers[i].state == State::kDone;
  }
  return "block " + std::to_string(m.block) + " is stuck: " + std::to_string(barrier) +
         " threads at the block barrier, " + std::to_string(warp) + " at a warp collective, " + std::to_string(done) +
         " finished, of " + std::to_string(m.threads);
}

void run_block(int threads) {
  Machine& m = machine();
  m.at_barrier = 0;
  m.error.clear();
  release(&m.begin);
  for (int i = 0; i < threads; ++i) {
    Fiber& f = m.fibers[i];
    if (__tsan_create_fiber) f.tsan = __tsan_create_fiber(0);
    prepare_context(f.context, f.stack, kStackBytes, fiber_entry);
    f.state = State::kReady;
  }
  m.barrier_generation = 0;
  for (auto& w : m.warps) w->arrived = w->generation = 0;
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = m.schedule == Schedule::kReverse ? threads - 1 - i : i;
  bool all_done = false;
  while (!all_done && m.error.empty()) {
    if (m.schedule == Schedule::kRandom) std::shuffle(order.begin(), order.end(), m.random);
    bool ran = false;
    all_done = true;
    for (int i : order) {
      if (m.fibers[i].state == State::kReady) {
        ran = true;
        m.current = i;
        if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(m.fibers[i].tsan, kTsanNoSync);
        switch_context(m.scheduler, m.fibers[i].context);
        if (!m.error.empty()) break;
      }
      all_done = all_done && m.fibers[i].state == State::kDone;
    }
    if (!ran && m.error.empty() && !all_done) m.error = describe_stall();
  }
  m.current = -1;
  for (int i = 0; i < threads; ++i)
    if (__tsan_destroy_fiber) __tsan_destroy_fiber(m.fibers[i].tsan);
  acquire(&m.end);
  if (!m.error.empty()) throw Failure(m.error);
}

}  // namespace

void set_schedule(Schedule schedule, uint64_t seed) {
  machine().schedule = schedule;
  machine().random.seed(seed);
}

void remove_barrier(int number) { machine().removed_barrier = number; }
int removed_barrier() { return machine().removed_barrier; }

void run_grid(int blocks, int threads, size_t shared_bytes, void (*body)(void*), void* context) {
  Machine& m = machine();
  if (threads % kWarp != 0) throw Failure("a block must be whole warps, not " + std::to_string(threads) + " threads");
  while (int(m.fibers.size()) < threads) {
    Fiber f;
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw Failure("no memory for a fibre's stack");
    f.stack = static_cast<char*>(stack);
    m.fibers.push_back(f);
  }
  m.warps.resize(threads / kWarp);
  for (auto& w : m.warps)
    if (!w) w = std::make_unique<Warp>();
  m.threads = threads;
  m.blocks = blocks;
  m.body = body;
  m.body_context = context;
  if (__tsan_get_current_fiber) m.scheduler_tsan = __tsan_get_current_fiber();
  for (m.block = 0; m.block < blocks; ++m.block) {
    m.memory.reset(new char[shared_bytes + 2 * kGuardBytes + 128]);
    const auto address = reinterpret_cast<uintptr_t>(m.memory.get()) + kGuardBytes;
    m.shared = reinterpret_cast<char*>((address + 127) / 128 * 128);
    for (size_t i = 0; i < shared_bytes + 2 * kGuardBytes; ++i)
      const_cast<volatile char*>(m.shared - kGuardBytes)[i] = char(kPoison);
    run_block(threads);
    for (size_t i = 0; i < kGuardBytes; ++i)
      if (static_cast<unsigned char>(m.shared[shared_bytes + i]) != kPoison ||
          static_cast<unsigned char>(m.shared[-1 - ptrdiff_t(i)]) != kPoison)
        throw Failure("a write outside the block's " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
}

void fail(const char* message) {
  machine().error = message;
  to_scheduler();
  __builtin_unreachable();
}

int thread_index() { return machine().current; }
int block_threads() { return machine().threads; }
int block_index() { return machine().block; }
int grid_blocks() { return machine().blocks; }
char* shared_memory() { return machine().shared; }

void block_barrier() {
  Machine& m = machine();
  char* barrier = &m.barriers[m.barrier_generation];
  release(barrier);
  if (++m.at_barrier == m.threads) {
    m.at_barrier = 0;
    m.barrier_generation ^= 1;
    for (int i = 0; i < m.threads; ++i) m.fibers[i].state = State::kReady;
  } else {
    m.fibers[m.current].state = State::kAtBarrier;
    to_scheduler();
  }
  acquire(barrier);
}

const char* warp_exchange(int operation, const void* bytes_in, int bytes) {
  Machine& m = machine();
  const int warp = m.current / kWarp, lane = m.current % kWarp;
  Warp& w = *m.warps[warp];
  if (w.arrived > 0 && w.operation != operation)
    fail(("the lanes of warp " + std::to_string(warp) + " diverge: lane " + std::to_string(lane) +
          " reached collective " + std::to_string(operation) + ", others collective " + std::to_string(w.operation))
             .c_str());
  w.operation = operation;
  const int generation = w.generation;
  copy_plain(w.slots[generation][lane], static_cast<const char*>(bytes_in), bytes);
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    w.generation ^= 1;
    for (int i = 0; i < kWarp; ++i) m.fibers[warp * kWarp + i].state = State::kReady;
  } else {
    m.fibers[m.current].state = State::kAtWarp;
    to_scheduler();
  }
  return &w.slots[generation][0][0];
}

}  // namespace yopo::emulation
