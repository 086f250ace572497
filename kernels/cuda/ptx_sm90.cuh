// Hopper's instructions: mbarriers, TMA, wgmma, clusters. As ptx.cuh, the emulator has them all.
#pragma once

#include "ptx.cuh"
#include "sm90.h"

#ifdef FASTRES_EMULATOR
#include "emulated_sm90.h"
#else
namespace fastres::ptx {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FASTRES_SM90 1
#endif

// --- wgmma (the products are in wgmma.cuh). Accumulators are read only after wgmma_wait.

FASTRES_DEVICE void wgmma_fence() {
#ifdef FASTRES_SM90
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
FASTRES_DEVICE void wgmma_commit() {
#ifdef FASTRES_SM90
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// The registers pass through, so that the compiler reads none of them before.
template <int kNewest, int kRegisters>
FASTRES_DEVICE void wgmma_wait(float (&d)[kRegisters]) {
#ifdef FASTRES_SM90
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// What generic instructions wrote to shared memory becomes visible to wgmma and TMA.
FASTRES_DEVICE void fence_async_shared() {
#ifdef FASTRES_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// One lane of the warp, always the same. Behind it ptxas knows that one thread is there, and issues a TMA load as it
// stands; behind lane == 0 it makes a loop over threads of each.
FASTRES_DEVICE bool elect_one() {
  uint32_t elected = 0;
#ifdef FASTRES_SM90
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p;}" : "=r"(elected));
#endif
  return elected != 0;
}

// --- clusters

FASTRES_DEVICE uint32_t cluster_rank() {
  uint32_t rank = 0;
#ifdef FASTRES_SM90
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
FASTRES_DEVICE void sync_cluster() {
#ifdef FASTRES_SM90
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// As sync_cluster, but only what blocks wrote to their own shared memory is then there for the others to read. A release of
// everything is a MEMBAR.ALL.GPU, a round trip to the L2; this one (PTX ISA 8.6) stays in the SM.
FASTRES_DEVICE void sync_cluster_shared() {
#ifdef FASTRES_SM90
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#else
  sync_cluster();
#endif
#endif
}
// The two halves of a barrier that orders nothing in memory: after it, all have done what they read before.
FASTRES_DEVICE void arrive_cluster_relaxed() {
#ifdef FASTRES_SM90
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
FASTRES_DEVICE void wait_cluster() {
#ifdef FASTRES_SM90
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// This block's shared address, in the block `rank` of the cluster.
FASTRES_DEVICE uint32_t address_in(uint32_t address, uint32_t rank) {
  uint32_t remote = address;
#ifdef FASTRES_SM90
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
#endif
  return remote;
}
FASTRES_DEVICE float4 load_cluster(uint32_t address) {
  float4 v{};
#ifdef FASTRES_SM90
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
#endif
  return v;
}

// --- mbarriers

FASTRES_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
#ifdef FASTRES_SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}
// After all barrier_init of a block, before its threads (and TMA) use them.
FASTRES_DEVICE void fence_barrier_init() {
#ifdef FASTRES_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
FASTRES_DEVICE void barrier_arrive(uint32_t barrier) {
#ifdef FASTRES_SM90
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}
FASTRES_DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
#ifdef FASTRES_SM90
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
// Waits until the phase of this parity is over. Bounded in debug builds: a deadlock traps instead of hanging.
FASTRES_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef FASTRES_SM90
  uint32_t done = 0;
#ifdef FASTRES_CUDA_DEBUG
  for (long long tries = 0; !done; ++tries) {
    if (tries > (1ll << 26)) __trap();
#else
  while (!done) {
#endif
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
#endif
}

// --- TMA: boxes of a tensor map, innermost coordinate first; what lies outside of the tensor reads as zero.

FASTRES_DEVICE void prefetch_map(const TensorMap* map) {
#ifdef FASTRES_SM90
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}
FASTRES_DEVICE void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
#endif
}
FASTRES_DEVICE void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}
FASTRES_DEVICE void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}
// A run of output pixels of an im2col map: the first one's window begins at column w, row h of image n; the tap lies
// (offset_w, offset_h) further.
FASTRES_DEVICE void load_im2col(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int w, int h, int n,
                                int offset_w, int offset_h) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(offset_w)),
      "h"(static_cast<uint16_t>(offset_h))
      : "memory");
#endif
}
FASTRES_DEVICE void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3,
                             int c4) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#endif
}
FASTRES_DEVICE void store_box(const TensorMap* map, uint32_t from, int c0, int c1) {
#ifdef FASTRES_SM90
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(c0), "r"(c1)
               : "memory");
#endif
}
FASTRES_DEVICE void store_box(const TensorMap* map, uint32_t from, int c0, int c1, int c2, int c3) {
#ifdef FASTRES_SM90
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
#endif
}
FASTRES_DEVICE void store_commit() {
#ifdef FASTRES_SM90
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
// All but the newest kNewest groups have read their shared memory.
template <int kNewest>
FASTRES_DEVICE void store_wait_read() {
#ifdef FASTRES_SM90
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNewest) : "memory");
#endif
}
// All groups have written global memory.
FASTRES_DEVICE void store_wait_all() {
#ifdef FASTRES_SM90
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

template <int kRegisters>
FASTRES_DEVICE void take_registers() {
#ifdef FASTRES_SM90
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
FASTRES_DEVICE void give_registers() {
#ifdef FASTRES_SM90
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace fastres::ptx
#endif
