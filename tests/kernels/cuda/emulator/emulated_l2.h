// What kernels/cuda/ptx_l2.cuh says in assembly, said for the emulator: it has no L2, but takes made policies alone.
#pragma once

namespace fastres::ptx {

struct Policy {
  int eviction = 0;  // 0: never made
};
inline Policy make_policy(Eviction eviction) { return {1 + static_cast<int>(eviction)}; }
inline void check_policy(Policy policy) {
  if (policy.eviction < 1 || policy.eviction > 3) fail("TMA: a cache policy that nobody made");
}

inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, Policy policy) {
  check_policy(policy);
  load_box(to, map, barrier, c0, c1);
}
inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, Policy policy) {
  check_policy(policy);
  load_box(to, map, barrier, c0, c1, c2);
}
inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3, Policy policy) {
  check_policy(policy);
  load_box(to, map, barrier, c0, c1, c2, c3);
}
inline void store_box(const TensorMap* map, uint32_t from, int c0, int c1, Policy policy) {
  check_policy(policy);
  store_box(map, from, c0, c1);
}
inline void store_box(const TensorMap* map, uint32_t from, int c0, int c1, int c2, Policy policy) {
  check_policy(policy);
  store_any(map, from, 3, {c0, c1, c2, 0, 0});
}
inline void store_box(const TensorMap* map, uint32_t from, int c0, int c1, int c2, int c3, Policy policy) {
  check_policy(policy);
  store_box(map, from, c0, c1, c2, c3);
}
inline void load_box_multicast(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int blocks,
                               Policy policy) {
  check_policy(policy);
  load_box_multicast(to, map, barrier, c0, c1, c2, blocks);
}
inline void load_im2col(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int w, int h, int n, int offset_w,
                        int offset_h, Policy policy) {
  check_policy(policy);
  load_im2col(to, map, barrier, c, w, h, n, offset_w, offset_h);
}

}  // namespace fastres::ptx
