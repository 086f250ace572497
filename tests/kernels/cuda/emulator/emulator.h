// CUDA on the CPU, for tests without a GPU: kernels/cuda compiles against this instead of ptx.cuh's assembly.
//
// Every CUDA thread is a fiber; blocks of a cluster run interleaved. A barrier, a warp-wide instruction or an mbarrier
// wait hands over to the next fiber; if none can go on, that is a deadlock and is reported with the places waited at.
// Copies (cp.async, TMA) and products (wgmma) each happen as early or as late as the programming model allows, as
// emulator_configure says, so that a missing wait and a buffer reused too early both show as wrong numbers. With
// programmatic dependent launch a kernel's blocks start, and run up to their wait, before their predecessor's end.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

struct Block;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;
  void perform() const {
    std::memcpy(to, from, valid);
    std::memset(to + valid, 0, bytes - valid);
  }
};

struct Thread {
  void* stack_pointer = nullptr;
  uint3 index{};
  int lane = 0, warp = 0, linear = 0;
  Block* block = nullptr;
  bool done = false;
  unsigned cluster_phase = 0;  // that it arrived in
  bool stored_remotely = false;  // into another block, with no fence since
  bool registers_fenced = false;  // wgmma.fence since the last wait
  bool async_fenced = false;      // fence.proxy.async since the last barrier
  bool all_fenced = false;        // all who met at that barrier had one before it
  bool (*ready)(void*) = nullptr;
  void* argument = nullptr;
  const char* where = "";
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  std::vector<std::function<void()>> open_stores;
  std::deque<std::vector<std::function<void()>>> stores;
};

// A meeting of `size` threads; the last one to come acts for all.
struct Meeting {
  int arrived = 0, size = 0;
  unsigned generation = 0;
  const char* operation = nullptr;
  bool fenced = true, fenced_before = false;  // fence.proxy.async by all who came, of this meeting and the last one
  std::vector<void*> slot;
  std::deque<std::vector<std::function<void()>>> groups;  // a warp's wgmma in flight
  std::vector<std::function<void()>> open;
};

// A kernel launch.
struct Call {
  const char* name;
  const void* function;
  void (*invoke)(const void*, const void*);
  const void* parameters;
  dim3 grid, block;
  unsigned shared_bytes, cluster;
  bool overlap;  // with the launch before it (programmatic stream serialization)
};
struct Grid {
  const Call* call = nullptr;
  Grid* before = nullptr;
  size_t blocks = 0, next = 0, live = 0, finished = 0;  // next, live: clusters
  size_t signalled = 0;  // blocks that have let the successor start, or ended
  bool done() const { return finished == blocks; }
  bool may_start() const { return !before || before->done() || (call->overlap && before->signalled == before->blocks); }
};

struct Block {
  Grid* owner = nullptr;
  bool signalled = false;
  dim3 index, grid, size;
  int rank = 0, cluster = 1;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  unsigned shared_bytes = 0;
  std::vector<Thread> threads;
  size_t alive = 0;
  std::vector<Meeting> warps, warpgroups, barriers;
  std::vector<Block*> peers;  // of the cluster, by rank
  Meeting* whole_cluster = nullptr;
  int left_cluster_barrier = 0;
};

struct Run {
  std::deque<std::function<void()>> pending;  // TMA that has not landed yet
  std::string error;
};

extern Thread* self;
extern Run* run;
extern bool late, late_products;

[[noreturn]] void fail(const std::string& message);
void yield();
// cudaFuncSetAttribute's limit of a function, 48 KB unless set: as there, a lower one takes a higher one back.
void set_dynamic_shared(const void* function, int bytes);
// Runs the launches of a stream; returns when all are done.
void launch(const std::vector<Call>& row);

template <class Ready>
void wait_until(const char* where, Ready ready) {
  while (!ready()) {
    self->where = where;
    self->argument = &ready;
    self->ready = [](void* r) { return (*static_cast<Ready*>(r))(); };
    yield();
  }
}

// All threads of the meeting pass `mine`; the last one runs act(slots).
template <class Act>
void meet(Meeting& m, int place, const char* operation, void* mine, Act act) {
  if (m.arrived == 0) m.operation = operation;
  if (std::strcmp(m.operation, operation) != 0)
    fail(std::string("threads that must agree do not: ") + m.operation + " and " + operation);
  m.slot[place] = mine;
  const unsigned generation = m.generation;
  if (++m.arrived == m.size) {
    act(m.slot);
    m.arrived = 0;
    ++m.generation;
  } else {
    wait_until(operation, [&] { return m.generation != generation; });
  }
}

template <class Act>
void warp_meet(const char* operation, void* mine, Act act) {
  meet(self->block->warps[self->warp], self->lane, operation, mine, act);
}

inline unsigned shared_offset(const void* p) {
  const Block& b = *self->block;
  const auto offset = static_cast<const unsigned char*>(p) - b.shared;
  if (offset < 0 || offset >= static_cast<long>(b.shared_bytes)) fail("not an address in shared memory");
  return static_cast<unsigned>(offset);
}

// A 32-bit shared address: rank of the block in the cluster + 1 above, offset below (0: this block).
inline unsigned char* shared_pointer(unsigned address, int bytes) {
  Block* b = self->block;
  if (address >> 24) b = b->peers.at((address >> 24) - 1);
  if (b->alive == 0) fail("shared memory of a block that has left");
  const unsigned offset = address & 0xffffff;
  if (offset + bytes > b->shared_bytes) fail("shared memory address " + std::to_string(offset) + " out of bounds");
  if (bytes && offset % (bytes > 16 ? 16 : bytes)) fail("misaligned shared memory address");
  return b->shared + offset;
}

}  // namespace emulator

#undef threadIdx
#define threadIdx (::emulator::self->index)
#define blockIdx (::emulator::self->block->index)
#define blockDim (::emulator::self->block->size)
#define gridDim (::emulator::self->block->grid)
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline

#include "emulated_ptx.h"
