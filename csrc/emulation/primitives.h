// The emulated half of cuda/primitives.h: the same names on the fibres of emulation/fibers.h.
//
// The fragment map of mma is written from the PTX manual ("Matrix fragments for mma.m16n8k8"), not from the kernels'
// loaders. Operands are truncated to tf32 as the tensor core does, so a forgotten to_tf32 costs accuracy here too.
#pragma once

#include <cstdint>
#include <cstring>
#include <set>

#include "core/narrow.h"
#include "emulation/fibers.h"
#include "launch.h"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define YOPO_DEVICE inline

namespace yopo::cuda {

inline int tid() { return emulation::thread_index(); }
inline int size() { return emulation::block_threads(); }
inline int block() { return emulation::block_index(); }
inline int blocks() { return emulation::grid_blocks(); }
inline int lane() { return tid() % 32; }
inline int warp() { return tid() / 32; }
inline char* shared_memory() { return emulation::shared_memory(); }
template <int kSite>
inline void sync() {
  if (kSite != emulation::removed_barrier()) emulation::block_barrier();
}

inline uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

enum Collective : int { kShuffleXor = 1000, kMmaTf32 = 2000 };

template <class T>
inline T shfl_xor(T value, int mask) {
  const char* slots = emulation::warp_exchange(kShuffleXor + mask, &value, sizeof(T));
  T other;
  std::memcpy(&other, slots + 64 * (lane() ^ mask), sizeof(T));
  return other;
}

inline uint32_t to_tf32(float value) {  // to nearest, ties away from zero, once mma has left out the low 13 bits
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits & 0x7F800000u) == 0x7F800000u ? bits : bits + 0x1000u;
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// d += A (16x8, row) * B (8x8, col).
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const char* slots = emulation::warp_exchange(kMmaTf32, mine, sizeof(mine));
  auto operand = [slots](int lane, int index) {
    uint32_t bits;
    std::memcpy(&bits, slots + 64 * lane + 4 * index, 4);
    return double(bits_float(bits & 0xFFFFE000u));
  };
  // PTX: groupID = lane >> 2, threadID_in_group = lane % 4.
  // A: row = groupID (a0, a2) or groupID + 8 (a1, a3); column = threadID (a0, a1) or threadID + 4 (a2, a3).
  // B: row = threadID (b0) or threadID + 4 (b1); column = groupID.
  // C: row = groupID (c0, c1) or groupID + 8 (c2, c3); column = 2 threadID + (index & 1).
  for (int i = 0; i < 4; ++i) {
    const int row = (lane() >> 2) + (i >= 2 ? 8 : 0), column = (lane() % 4) * 2 + (i & 1);
    double sum = 0;
    for (int k = 0; k < 8; ++k) {
      const double av = operand((row % 8) * 4 + k % 4, (row / 8) + (k / 4) * 2);
      const double bv = operand(column * 4 + k % 4, 4 + k / 4);
      sum += av * bv;
    }
    d[i] = float(double(d[i]) + sum);
  }
}

template <class T>
inline T ld_stream(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) emulation::fail("a misaligned load");
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

template <class T>
inline void st_stream(T* address, T value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) emulation::fail("a misaligned store");
  std::memcpy(address, &value, sizeof(T));
}

inline void prefetch(const void* address) { (void)*static_cast<const volatile char*>(address); }

inline void store_pair(float* address, float first, float second) {
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0) emulation::fail("a misaligned shared-memory store");
  address[0] = first;
  address[1] = second;
}

inline uint16_t half_from_float(float value) { return narrow<Float16>(value).bits; }
inline float float_from_half(uint16_t half) { return widen(Float16{half}); }

// ---- launching ----

struct DeviceLimits {
  int shared_bytes_per_block, shared_bytes_per_processor, processors;
};

DeviceLimits device_limits();
void set_device_limits(const DeviceLimits& limits);  // what the tests pretend to run on

inline int current_device() { return 0; }

struct RelaxedCapture {
  RelaxedCapture() {}
};

// The kernels prepared so far: launching another one fails, as it would in a graph capture.
inline std::set<const void*>& prepared_kernels() {
  static std::set<const void*> kernels;
  return kernels;
}

template <class Args>
inline Status prepare(void (*kernel)(Args)) {
  prepared_kernels().insert(reinterpret_cast<const void*>(kernel));
  return {};
}

template <class Args>
inline Status launch(void (*kernel)(Args), const Args& args, int blocks, int threads, int shared_bytes, CudaStream) {
  if (prepared_kernels().count(reinterpret_cast<const void*>(kernel)) == 0)
    return {"a kernel is launched that prepare_device() leaves out"};
  struct Call {
    void (*kernel)(Args);
    const Args* args;
  } call{kernel, &args};
  emulation::run_grid(
      blocks, threads, size_t(shared_bytes),
      [](void* context) {
        auto* c = static_cast<Call*>(context);
        c->kernel(*c->args);
      },
      &call);
  return {};
}

}  // namespace yopo::cuda
