// What blocks of a cluster do in each other's shared memory: arrive, store, load once for all. As ptx.cuh, the emulator
// has it all.
#pragma once

#include "ptx_sm90.cuh"

#ifndef FASTRES_EMULATOR
namespace fastres::ptx {

// barrier, address: of address_in. An arrival says that this thread (and its wgmma) has done reading; that it has written
// to another block takes fence_cluster before. A release at cluster scope here would do so always: ptxas makes it a
// MEMBAR.ALL.GPU, a round trip to the L2 in every step of the depth. CUTLASS's consumers arrive in the same way.
FASTRES_DEVICE void barrier_arrive_cluster(uint32_t barrier) {
#ifdef FASTRES_SM90
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}
// What this thread wrote before is visible to who waits, with barrier_wait_cluster, for an arrival after.
FASTRES_DEVICE void fence_cluster() {
#ifdef FASTRES_SM90
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
}
FASTRES_DEVICE void store_cluster(uint32_t address, int v) {
#ifdef FASTRES_SM90
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
#endif
}
// As barrier_wait, where other blocks have written to this one's memory (it empties the L1: not for every step).
FASTRES_DEVICE void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
#ifdef FASTRES_SM90
  uint32_t done = 0;
#ifdef FASTRES_CUDA_DEBUG
  for (long long tries = 0; !done; ++tries) {
    if (tries > (1ll << 26)) __trap();
#else
  while (!done) {
#endif
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
#endif
}

// load_box into the same place of every block in `blocks` (a bit a rank); each one's barrier at the same place gets the
// bytes.
FASTRES_DEVICE void load_box_multicast(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2,
                                       int blocks) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
      "l"(map), "r"(barrier), "h"(static_cast<uint16_t>(blocks)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}

// --- 8 x 8 matrices of 16-bit elements between shared memory and mma's fragments, transposed: a row of memory is a
// column of the fragment. Lane i gives the address of row i % 8 of matrix i / 8.

FASTRES_DEVICE void load_transposed_x4(uint32_t (&r)[4], uint32_t address) {
#ifdef FASTRES_SM90
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}
FASTRES_DEVICE void store_transposed_x4(uint32_t address, const uint32_t (&r)[4]) {
#ifdef FASTRES_SM90
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

}  // namespace fastres::ptx
#endif
