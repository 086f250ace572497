// Fields of Hopper's descriptors, and the host's side of TMA. Plain arithmetic, tested against brute force.
#pragma once

#include <cstdint>

#include "launch.h"

namespace fastres {

// --- shared memory of wgmma and TMA: rows of 128 bytes, in groups of eight, the group at a multiple of 1,024 bytes.

constexpr int kSwizzleRow = 128;
// The 16-byte chunks of a row are permuted by the row's number in its group.
FASTRES_BOTH constexpr int swizzle_128(int row, int chunk) { return row * kSwizzleRow + ((chunk ^ row) & 7) * 16; }

// wgmma's matrix descriptor (PTX ISA, "Matrix Descriptor Format"), both operands with the depth innermost: start
// address, 1,024 bytes from one group of eight rows to the next, 128-byte swizzle. Depth advances by adding its bytes
// to the address, within the row.
FASTRES_BOTH constexpr uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kGroupStride = 1024 >> 4, kSwizzle128 = 1;
  return (static_cast<uint64_t>(address & 0x3ffff) >> 4) | uint64_t{1} << 16 | kGroupStride << 32 | kSwizzle128 << 62;
}
// 16 elements further along the depth.
constexpr uint64_t kDescriptorStep = 32 >> 4;

// --- warp roles

// Registers a thread that a block starts with (a multiple of eight); setmaxnreg only moves them among its warps.
FASTRES_BOTH constexpr int start_registers(int threads) { return 65536 / threads / 8 * 8; }

// --- TMA

// What the L2 drops before and after everything else.
enum class Eviction : int { kNormal, kFirst, kLast };

struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

// A map over a dense tensor of 16-bit elements: sizes and box innermost first, strides in bytes of dimensions 1 on,
// 128-byte swizzle (the box's innermost extent is 64 elements). `step`: of every dimension but the
// innermost a box has each step-th element.
//
// With traversal[0] it is an im2col map over [n, h, w, c] (rank 4): a load takes box[0] channels of box[1] windows, one
// after the other in the order w, h, n (PTX ISA, "im2col mode"). Index 0 is w, 1 is h. Windows begin at lower, move by
// traversal while they do not pass size - 1 + upper, then the next row begins at lower again.
struct TensorMapFields {
  Type type;
  int rank;
  const void* base;
  uint64_t size[5];
  uint64_t stride[4];
  uint32_t box[5];
  int8_t lower[2], upper[2];
  uint8_t traversal[2];
  uint8_t step[5] = {1, 1, 1, 1, 1};
};
// Throws std::runtime_error where CUDA refuses it.
TensorMap make_tensor_map(const TensorMapFields& fields);

}  // namespace fastres
