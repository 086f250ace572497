// TMA's loads and stores of ptx_sm90.cuh and ptx_cluster.cuh with a word on what the L2 may evict. As ptx.cuh, the
// emulator has it all.
#pragma once

#include "ptx_cluster.cuh"

#ifndef FASTRES_EMULATOR
namespace fastres::ptx {

struct Policy {
  uint64_t bits;
};
FASTRES_DEVICE Policy make_policy(Eviction eviction) {
  Policy policy{};
#ifdef FASTRES_SM90
  if (eviction == Eviction::kFirst) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy.bits));
  } else if (eviction == Eviction::kLast) {
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy.bits));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy.bits));
  }
#endif
  return policy;
}

FASTRES_DEVICE void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, Policy policy) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "l"(policy.bits)
      : "memory");
#endif
}
FASTRES_DEVICE void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2,
                             Policy policy) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "l"(policy.bits)
      : "memory");
#endif
}
FASTRES_DEVICE void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3,
                             Policy policy) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy.bits)
      : "memory");
#endif
}
FASTRES_DEVICE void store_box(const TensorMap* map, uint32_t from, int c0, int c1, Policy policy) {
#ifdef FASTRES_SM90
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], %4;" ::"l"(map),
               "r"(from), "r"(c0), "r"(c1), "l"(policy.bits)
               : "memory");
#endif
}
FASTRES_DEVICE void store_box(const TensorMap* map, uint32_t from, int c0, int c1, int c2, Policy policy) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4}], [%1], %5;" ::"l"(map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2), "l"(policy.bits)
      : "memory");
#endif
}
FASTRES_DEVICE void store_box(const TensorMap* map, uint32_t from, int c0, int c1, int c2, int c3, Policy policy) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy.bits)
      : "memory");
#endif
}

FASTRES_DEVICE void load_box_multicast(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2,
                                       int blocks, Policy policy) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%4, %5, %6}], [%2], %3, %7;" ::"r"(to),
      "l"(map), "r"(barrier), "h"(static_cast<uint16_t>(blocks)), "r"(c0), "r"(c1), "r"(c2), "l"(policy.bits)
      : "memory");
#endif
}
FASTRES_DEVICE void load_im2col(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int w, int h, int n,
                                int offset_w, int offset_h, Policy policy) {
#ifdef FASTRES_SM90
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(offset_w)),
      "h"(static_cast<uint16_t>(offset_h)), "l"(policy.bits)
      : "memory");
#endif
}

}  // namespace fastres::ptx
#else
#include "emulated_l2.h"
#endif
