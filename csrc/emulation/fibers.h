// Runs one CUDA thread block on the CPU: a fibre per thread, all on one OS thread.
//
// A fibre runs until a collective (a barrier, a warp exchange), so a schedule decides in which order threads reach the
// code between two collectives. Shared memory starts as NaN, and threads that do not meet at the same collective are an
// error. This translation unit is never instrumented by ThreadSanitizer; the kernels are, and fibres switch without
// synchronising them, so that only barriers order what two threads do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace yopo::emulation {

enum class Schedule : int { kForward = 0, kReverse = 1, kRandom = 2 };

// What a kernel did wrong: divergent lanes, a barrier not everybody reached, an overrun of shared memory.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void set_schedule(Schedule schedule, uint64_t seed);

// Takes the barrier of this number out of the kernels (0: none): what a test expects to be noticed.
void remove_barrier(int number);
int removed_barrier();

// Runs body(context) in `threads` fibres for each of `blocks` blocks, one block after the other. Throws Failure.
void run_grid(int blocks, int threads, size_t shared_bytes, void (*body)(void*), void* context);

int thread_index();
int block_threads();
int block_index();
int grid_blocks();
char* shared_memory();

[[noreturn]] void fail(const char* message);  // called by a fibre: ends the grid, run_grid throws

void block_barrier();

// Every lane of the warp hands in `bytes` (at most 64) and gets everybody's, 64 bytes a lane. `operation` must agree.
const char* warp_exchange(int operation, const void* bytes_in, int bytes);

}  // namespace yopo::emulation
