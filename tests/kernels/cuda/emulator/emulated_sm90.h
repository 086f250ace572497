// What kernels/cuda/ptx_sm90.cuh says in assembly, said for the emulator.
#pragma once

#include <array>
#include <cstdio>
#include <memory>

#include "sm90.h"

namespace fastres::ptx {

using emulator::Block;
using emulator::run;

// --- wgmma

inline unsigned char* swizzled(unsigned char* base, uint32_t limit, uint32_t address, int bytes) {
  address ^= (address >> 7 & 7) << 4;
  if (address + bytes > limit) fail("wgmma reads beyond shared memory");
  return base + address;
}
// Element (row, k) of an operand, as the hardware finds it from the descriptor.
template <class T>
float operand(Block& block, uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("wgmma: only the 128-byte swizzle is emulated");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t group = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  T v;
  std::memcpy(&v, swizzled(block.shared, block.shared_bytes, start + row / 8 * group + row % 8 * 128 + k * 2, 2), 2);
  return static_cast<float>(v);
}

struct WgmmaIo {
  float* d;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool accumulate;
};

// The rows of the warps [begin, end) of the group.
template <class T, int N>
void perform_wgmma(Block* block, const std::vector<void*>& slot, int begin, int end) {
  const WgmmaIo& first = *static_cast<WgmmaIo*>(slot[0]);
  float a[64][16], b[N][16];
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < N; ++n) b[n][k] = operand<T>(*block, first.b, n, k);
    if (!first.a_registers)
      for (int m = begin * 16; m < end * 16; ++m) a[m][k] = operand<T>(*block, first.a, m, k);
  }
  for (int thread = begin * 32; thread < end * 32; ++thread) {
    const WgmmaIo& io = *static_cast<WgmmaIo*>(slot[thread]);
    if (io.b != first.b || io.a != first.a || io.accumulate != first.accumulate) fail("wgmma: the threads disagree");
    const int lane = thread % 32, top = thread / 32 * 16 + lane / 4;
    if (io.a_registers)
      for (int i = 0; i < 4; ++i)
        for (int h = 0; h < 2; ++h)
          a[top + i % 2 * 8][(lane % 4 + i / 2 * 4) * 2 + h] = half_of(io.a_registers[i], h, T{});
  }
  for (int thread = begin * 32; thread < end * 32; ++thread) {
    const WgmmaIo& io = *static_cast<WgmmaIo*>(slot[thread]);
    const int lane = thread % 32, top = thread / 32 * 16 + lane / 4;
    for (int i = 0; i < N / 2; ++i) {
      const int m = top + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = io.accumulate ? io.d[i] : 0.0;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[m][k]) * b[n][k];
      io.d[i] = static_cast<float>(sum);
    }
  }
}

template <class T, int N>
void wgmma_meet(WgmmaIo mine) {
  // Registers were accessed by others since, at the least the accumulators of the product before.
  if (!self->registers_fenced) fail("wgmma after a wait, or the first one, without wgmma_fence");
  const int group = self->warp / 4;
  // Registers of A and the arguments live in the caller's frame: what happens later works on copies of them.
  emulator::meet(self->block->warpgroups[group], self->linear % 128, "wgmma", &mine, [&](auto& slot) {
    if (!emulator::late_products) return perform_wgmma<T, N>(self->block, slot, 0, 4);
    auto copies = std::make_shared<std::vector<std::pair<WgmmaIo, std::array<uint32_t, 4>>>>(128);
    std::vector<void*> later(128);
    for (int i = 0; i < 128; ++i) {
      auto& [io, registers] = (*copies)[i];
      io = *static_cast<WgmmaIo*>(slot[i]);
      if (io.a_registers) {
        std::copy_n(io.a_registers, 4, registers.begin());
        io.a_registers = registers.data();
      }
      later[i] = &io;
    }
    // Every warp's rows in its own time: one warp's wait says nothing of the others'.
    for (int warp = 0; warp < 4; ++warp)
      self->block->warps[group * 4 + warp].open.push_back(
          [copies, later, warp, block = self->block] { perform_wgmma<T, N>(block, later, warp, warp + 1); });
  });
}
template <class T>
void wgmma(float (&d)[16], uint64_t a, uint64_t b, bool accumulate, T) {
  wgmma_meet<T, 32>({d, nullptr, a, b, accumulate});
}
template <class T>
void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool accumulate, T) {
  wgmma_meet<T, 64>({d, nullptr, a, b, accumulate});
}
template <class T>
void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate, T) {
  wgmma_meet<T, 128>({d, nullptr, a, b, accumulate});
}
template <class T>
void wgmma(float (&d)[112], uint64_t a, uint64_t b, bool accumulate, T) {
  wgmma_meet<T, 224>({d, nullptr, a, b, accumulate});
}
template <class T>
void wgmma(float (&d)[128], uint64_t a, uint64_t b, bool accumulate, T) {
  wgmma_meet<T, 256>({d, nullptr, a, b, accumulate});
}
// a: registers; N is twice the number of accumulators, whatever shapes the headers spell out.
template <class T, int kRegisters>
void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate, T) {
  wgmma_meet<T, 2 * kRegisters>({d, a, 0, b, accumulate});
}

inline void wgmma_fence() { self->registers_fenced = true; }
inline void wgmma_commit() {
  emulator::Meeting& warp = self->block->warps[self->warp];
  emulator::warp_meet("wgmma_commit", nullptr, [&](auto&) {
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
  });
}
template <int kNewest, int kRegisters>
void wgmma_wait(float (&)[kRegisters]) {
  if (kNewest == 0) self->registers_fenced = false;
  emulator::Meeting& warp = self->block->warps[self->warp];
  emulator::warp_meet("wgmma_wait", nullptr, [&](auto&) {
    for (; warp.groups.size() > kNewest; warp.groups.pop_front())
      for (auto& product : warp.groups.front()) product();
  });
}
inline void fence_async_shared() { self->async_fenced = true; }

inline bool elect_one() { return self->linear % 32 == 0; }

// --- clusters

inline uint32_t cluster_rank() { return static_cast<uint32_t>(self->block->rank); }
inline void sync_cluster() {
  self->stored_remotely = false;
  emulator::meet(*self->block->whole_cluster, 0, "sync_cluster", nullptr, [](auto&) {});
}
inline void sync_cluster_shared() {
  if (self->stored_remotely) fail("sync_cluster_shared does not order a store to another block");
  sync_cluster();
}
inline void arrive_cluster_relaxed() {
  emulator::Meeting& m = *self->block->whole_cluster;
  self->cluster_phase = m.generation;
  if (++m.arrived == m.size) m.arrived = 0, ++m.generation;
}
inline void wait_cluster() {
  const emulator::Meeting& m = *self->block->whole_cluster;
  emulator::wait_until("wait_cluster", [&] { return m.generation != self->cluster_phase; });
}
inline uint32_t address_in(uint32_t address, uint32_t rank) { return (rank + 1) << 24 | address; }
inline float4 load_cluster(uint32_t address) {
  float4 v;
  std::memcpy(&v, emulator::shared_pointer(address, 16), 16);
  return v;
}

// --- mbarriers

struct Barrier {
  int16_t pending, count;
  int32_t phase_and_bytes;  // parity in bit 0, bytes still to come above

  bool parity() const { return phase_and_bytes & 1; }
  int bytes() const { return phase_and_bytes >> 1; }
  void add_bytes(int n) {
    phase_and_bytes += n * 2;
    if (bytes() >= 1 << 20 || bytes() <= -(1 << 20)) fail("an mbarrier counts fewer than 2^20 bytes");
  }
  void settle() {
    if (pending == 0 && bytes() == 0) {
      pending = count;
      phase_and_bytes ^= 1;
    }
  }
};
static_assert(sizeof(Barrier) == 8);
inline Barrier& barrier_at(Block* block, uint32_t address) {
  if (address % 8 || address + 8 > block->shared_bytes) fail("no address of an mbarrier");
  return *reinterpret_cast<Barrier*>(block->shared + address);
}
inline void barrier_init(uint32_t barrier, int arrivals) {
  barrier_at(self->block, barrier) = {static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0};
}
inline void fence_barrier_init() {}
inline void barrier_arrive(uint32_t barrier) {
  Barrier& b = barrier_at(self->block, barrier);
  if (b.pending <= 0) fail("more arrivals than the mbarrier counts");
  --b.pending;
  b.settle();
}
inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
  Barrier& b = barrier_at(self->block, barrier);
  if (b.pending <= 0) fail("more arrivals than the mbarrier counts");
  b.add_bytes(bytes);
  --b.pending;
  b.settle();
}
inline void barrier_arrive_cluster(uint32_t barrier) {
  emulator::shared_pointer(barrier, 8);
  Block* block = barrier >> 24 ? self->block->peers.at((barrier >> 24) - 1) : self->block;
  // The arrival may come before what it should tell of.
  if (self->stored_remotely) fail("arrival at a block after a store there, without fence_cluster");
  Barrier& b = barrier_at(block, barrier & 0xffffff);
  if (b.pending <= 0) fail("more arrivals than the mbarrier counts");
  --b.pending;
  b.settle();
}
inline void fence_cluster() { self->stored_remotely = false; }
inline void store_cluster(uint32_t address, int v) {
  self->stored_remotely = true;
  std::memcpy(emulator::shared_pointer(address, 4), &v, 4);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  Barrier& b = barrier_at(self->block, barrier);
  static thread_local char places[4096][24];
  char* where = places[barrier / 8 % 4096];
  std::snprintf(where, 24, "mbarrier@%u", barrier);
  emulator::wait_until(where, [&] { return b.parity() != (parity & 1); });
}

inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) { barrier_wait(barrier, parity); }

// --- TMA: the map's fields lie in the opaque bytes as they are.

static_assert(sizeof(TensorMapFields) <= sizeof(TensorMap));
inline TensorMapFields unpack_tensor_map(const TensorMap& map) {
  TensorMapFields fields;
  std::memcpy(&fields, map.opaque, sizeof fields);
  return fields;
}

inline void prefetch_map(const TensorMap*) {}

// Where a load begins: coordinates, innermost first, and the tap's offset for im2col maps (w, h).
struct BoxPlace {
  std::array<int, 5> c;
  std::array<int, 2> offset{};
};

// f(shared bytes, global element or null) for every element of the box.
template <class F>
void for_box(Block* block, uint32_t at, const TensorMap* map, const BoxPlace& place, F f) {
  const TensorMapFields t = unpack_tensor_map(*map);
  const auto element = [&](const int64_t (&i)[5]) -> const unsigned char* {
    const auto* address = static_cast<const unsigned char*>(t.base);
    for (int d = 0; d < t.rank; ++d) {
      if (i[d] < 0 || i[d] >= static_cast<int64_t>(t.size[d])) return nullptr;
      address += d == 0 ? i[d] * 2 : i[d] * static_cast<int64_t>(t.stride[d - 1]);
    }
    return address;
  };
  const auto& c = place.c;
  uint32_t linear = 0;
  if (t.traversal[0]) {
    // Windows in the bounding box, row by row and image by image; the tap's offset moves what is read, not the box.
    int64_t w = c[1], h = c[2], n = c[3];
    const auto begin = [&](int d) { return static_cast<int64_t>(t.lower[d]); };
    const auto last = [&](int d) { return static_cast<int64_t>(t.size[1 + d]) - 1 + t.upper[d]; };
    if (w < begin(0) || w > last(0) || h < begin(1) || h > last(1)) fail("TMA: im2col begins outside of its bounding box");
    for (uint32_t pixel = 0; pixel < t.box[1]; ++pixel) {
      for (uint32_t channel = 0; channel < t.box[0]; ++channel, linear += 2)
        f(swizzled(block->shared, block->shared_bytes, at + linear, 2),
          element({c[0] + channel, w + place.offset[0], h + place.offset[1], n, 0}));
      if ((w += t.traversal[0]) <= last(0)) continue;
      w = begin(0);
      if ((h += t.traversal[1]) <= last(1)) continue;
      h = begin(1), ++n;
    }
    return;
  }
  int64_t index[5] = {};
  for (;;) {
    f(swizzled(block->shared, block->shared_bytes, at + linear, 2),
      element({c[0] + index[0], c[1] + index[1] * t.step[1], c[2] + index[2] * t.step[2], c[3] + index[3] * t.step[3],
               c[4] + index[4] * t.step[4]}));
    linear += 2;
    int d = 0;
    while (d < t.rank && ++index[d] == t.box[d]) index[d++] = 0;
    if (d == t.rank) return;
  }
}
inline int box_bytes(const TensorMap* map) {
  const TensorMapFields t = unpack_tensor_map(*map);
  int bytes = 2;
  for (int d = 0; d < (t.traversal[0] ? 2 : t.rank); ++d) bytes *= static_cast<int>(t.box[d]);
  return bytes;
}
// Into every block of the cluster whose bit is set in `blocks`.
inline void load_any(uint32_t to, const TensorMap* map, uint32_t barrier, int rank, const BoxPlace& place, int blocks,
                     bool im2col = false) {
  const TensorMapFields fields = unpack_tensor_map(*map);
  if (fields.rank != rank || (fields.traversal[0] != 0) != im2col) fail("TMA: the map is of another kind");
  if (to % 128) fail("TMA: misaligned destination");
  for (Block* block : self->block->peers) {
    if (!(blocks >> block->rank & 1)) continue;
    auto land = [=] {
      if (block->alive == 0) fail("TMA: lands in a block that has left");
      for_box(block, to, map, place, [](unsigned char* shared, const unsigned char* global) {
        if (global) std::memcpy(shared, global, 2);
        else std::memset(shared, 0, 2);
      });
      Barrier& b = barrier_at(block, barrier);
      b.add_bytes(-box_bytes(map));
      b.settle();
    };
    if (emulator::late) run->pending.push_back(land);
    else land();
  }
}
inline int only_here() { return 1 << self->block->rank; }
inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1) {
  load_any(to, map, barrier, 2, {{c0, c1}}, only_here());
}
inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  load_any(to, map, barrier, 3, {{c0, c1, c2}}, only_here());
}
inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  load_any(to, map, barrier, 4, {{c0, c1, c2, c3}}, only_here());
}
inline void load_box_multicast(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int blocks) {
  load_any(to, map, barrier, 3, {{c0, c1, c2}}, blocks);
}
inline void load_im2col(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int w, int h, int n, int offset_w,
                        int offset_h) {
  if (offset_w < 0 || offset_w > 255 || offset_h < 0 || offset_h > 255) fail("TMA: im2col offset out of range");
  load_any(to, map, barrier, 4, {{c, w, h, n}, {offset_w, offset_h}}, only_here(), true);
}
inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3, int c4) {
  load_any(to, map, barrier, 5, {{c0, c1, c2, c3, c4}}, only_here());
}
inline void store_any(const TensorMap* map, uint32_t from, int rank, std::array<int, 5> c) {
  if (unpack_tensor_map(*map).rank != rank) fail("TMA: the map has another rank");
  if (from % 128) fail("TMA: misaligned source");
  // What threads wrote is TMA's to read when each has fenced, and then all have met.
  if (!self->all_fenced) fail("TMA: a store without fence_async_shared of all threads before their barrier");
  auto land = [=, block = self->block] {
    for_box(block, from, map, {c}, [](unsigned char* shared, const unsigned char* global) {
      if (global) std::memcpy(const_cast<unsigned char*>(global), shared, 2);
    });
  };
  if (emulator::late) self->open_stores.push_back(land);
  else land();
}
inline void store_box(const TensorMap* map, uint32_t from, int c0, int c1) { store_any(map, from, 2, {c0, c1, 0, 0, 0}); }
inline void store_box(const TensorMap* map, uint32_t from, int c0, int c1, int c2, int c3) {
  store_any(map, from, 4, {c0, c1, c2, c3, 0});
}
inline void store_commit() {
  self->stores.push_back(std::move(self->open_stores));
  self->open_stores.clear();
}
template <int kNewest>
void store_wait_read() {
  for (; self->stores.size() > kNewest; self->stores.pop_front())
    for (auto& store : self->stores.front()) store();
}
inline void store_wait_all() { store_wait_read<0>(); }

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

}  // namespace fastres::ptx
