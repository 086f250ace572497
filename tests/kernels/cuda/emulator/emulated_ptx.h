// What kernels/cuda/ptx.cuh says in assembly, said for the emulator. Same names, same meaning.
#pragma once

#define FASTRES_DEVICE inline

namespace fastres::ptx {

using emulator::fail;
using emulator::self;

inline unsigned char* dynamic_shared() { return self->block->shared; }
inline uint32_t shared_address(const void* p) { return emulator::shared_offset(p); }

inline void meet_barrier(const char* name, int barrier, int threads) {
  emulator::Meeting& m = self->block->barriers.at(barrier);
  if (m.arrived && m.size != threads) fail("one barrier, two thread counts");
  m.size = threads;
  m.fenced &= self->async_fenced;
  self->async_fenced = false;
  // The place does not matter, only that all have come.
  emulator::meet(m, 0, name, nullptr, [&](auto&) { m.fenced_before = m.fenced, m.fenced = true; });
  self->all_fenced = m.fenced_before;
}
inline void sync_threads() { meet_barrier("sync_threads", 0, static_cast<int>(self->block->threads.size())); }
inline void sync_named(int barrier, int threads) {
  if (barrier == 0 || threads % 32) fail("invalid named barrier");
  meet_barrier("sync_named", barrier, threads);
}
inline void sync_warp() {
  emulator::warp_meet("sync_warp", nullptr, [](auto&) {});
}

template <class T>
T shuffle_with(const char* name, T v, int from) {
  struct Io {
    T in, out;
    int from;
  } io{v, v, from};
  emulator::warp_meet(name, &io, [](auto& slot) {
    for (void* p : slot) static_cast<Io*>(p)->out = static_cast<Io*>(slot[static_cast<Io*>(p)->from])->in;
  });
  return io.out;
}
inline float shuffle_xor(float v, int mask) { return shuffle_with("shuffle_xor", v, self->lane ^ mask); }
inline double shuffle_xor(double v, int mask) { return shuffle_with("shuffle_xor", v, self->lane ^ mask); }
inline int shuffle(int v, int lane) { return shuffle_with("shuffle", v, lane); }
inline int warp_index() { return self->linear / 32; }

inline int add_relaxed(int* counter, int v) {
  const int old = *counter;
  *counter += v;
  return old;
}
inline int add_acquire_release(int* counter, int v) { return add_relaxed(counter, v); }
inline void fence_device() {}

inline void copy_async_16(uint32_t to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async from a misaligned address");
  const emulator::Copy copy{emulator::shared_pointer(to, 16), static_cast<const unsigned char*>(from), 16,
                            valid ? 16 : 0};
  if (emulator::late) {
    self->open.push_back(copy);
  } else {
    copy.perform();
  }
}
inline void copy_async_commit() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}
template <int kNewest>
void copy_async_wait() {
  while (self->groups.size() > kNewest) {
    for (auto& copy : self->groups.front()) copy.perform();
    self->groups.pop_front();
  }
}

inline void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  struct Io {
    uint32_t* r;
    const unsigned char* row;
  } io{r, emulator::shared_pointer(address, 16)};
  emulator::warp_meet("ldmatrix", &io, [](auto& slot) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        std::memcpy(&static_cast<Io*>(slot[lane])->r[m], static_cast<Io*>(slot[8 * m + lane / 4])->row + lane % 4 * 4,
                    4);
  });
}

// Transposed: register i of a lane is elements (row lane % 4 * 2 and the next, column lane / 4) of the matrix in memory.
template <class Move>
void matrices_transposed(const char* name, uint32_t* r, uint32_t address, Move move) {
  struct Io {
    uint32_t* r;
    unsigned char* row;
  } io{r, emulator::shared_pointer(address, 16)};
  emulator::warp_meet(name, &io, [&](auto& slot) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int h = 0; h < 2; ++h)
          move(reinterpret_cast<unsigned char*>(&static_cast<Io*>(slot[lane])->r[m]) + 2 * h,
               static_cast<Io*>(slot[8 * m + lane % 4 * 2 + h])->row + lane / 4 * 2);
  });
}
inline void load_transposed_x4(uint32_t (&r)[4], uint32_t address) {
  matrices_transposed("ldmatrix.trans", r, address, [](unsigned char* a, unsigned char* b) { std::memcpy(a, b, 2); });
}
inline void store_transposed_x4(uint32_t address, const uint32_t (&r)[4]) {
  matrices_transposed("stmatrix.trans", const_cast<uint32_t*>(r), address,
                      [](unsigned char* a, unsigned char* b) { std::memcpy(b, a, 2); });
}

// The float of one 16-bit half of a register, or of a whole register with its low 13 bits cut off (TF32).
inline float half_of(uint32_t r, int half, __nv_bfloat16) {
  const uint32_t bits = (half ? r >> 16 : r & 0xffff) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float half_of(uint32_t r, int half, __half) {
  const uint16_t bits = static_cast<uint16_t>(half ? r >> 16 : r);
  __half h;
  std::memcpy(&h, &bits, 2);
  return __half2float(h);
}
inline float half_of(uint32_t r, int, float) {
  r &= ~0x1fffu;
  float f;
  std::memcpy(&f, &r, 4);
  return f;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  struct Io {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } io{d, a, {b0, b1}};
  emulator::warp_meet("mma", &io, [](auto& slot) {
    constexpr int kPer = 4 / sizeof(T);  // elements of k in a register
    float a[16][8 * kPer], b[8 * kPer][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Io& io = *static_cast<Io*>(slot[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int h = 0; h < kPer; ++h) {
        for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][(t + i / 2 * 4) * kPer + h] = half_of(io.a[i], h, T{});
        for (int i = 0; i < 2; ++i) b[(t + i * 4) * kPer + h][g] = half_of(io.b[i], h, T{});
      }
    }
    for (int row = 0; row < 16; ++row) {
      double sum[8] = {};
      for (int k = 0; k < 8 * kPer; ++k)
        for (int n = 0; n < 8; ++n) sum[n] += static_cast<double>(a[row][k]) * b[k][n];
      for (int n = 0; n < 8; ++n) {
        float& d = static_cast<Io*>(slot[row % 8 * 4 + n / 2])->d[row / 8 * 2 + n % 2];
        d = static_cast<float>(d + sum[n]);
      }
    }
  });
}
inline uint32_t round_tf32(uint32_t v) {
  // To nearest, ties away from zero; NaN and infinity keep their exponent.
  if ((v & 0x7f800000u) == 0x7f800000u) return v;
  return (v + 0x1000u) & ~0x1fffu;
}

inline float max_nan(float a, float b) { return a > b || a != a ? a : b; }
template <class T>
uint32_t pack_pair(float low, float high) {
  const T pair[] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}
template <class T>
uint32_t max_nan(uint32_t a, uint32_t b, T) {
  return pack_pair<T>(max_nan(half_of(a, 0, T{}), half_of(b, 0, T{})), max_nan(half_of(a, 1, T{}), half_of(b, 1, T{})));
}
template <class T>
uint32_t pack_relu(float low, float high, T) {
  return pack_pair<T>(max_nan(low, 0.f), max_nan(high, 0.f));
}

inline void wait_for_predecessor() {
  emulator::wait_until("griddepcontrol.wait", [before = self->block->owner->before] { return !before || before->done(); });
}
inline void let_successor_start() {
  if (!self->block->signalled) self->block->signalled = true, ++self->block->owner->signalled;
}

}  // namespace fastres::ptx
