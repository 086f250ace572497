// What the driver refuses when a tensor map is encoded (CUDA driver API, cuTensorMapEncodeTiled and
// cuTensorMapEncodeIm2col), for 16-bit elements with the 128-byte swizzle.
#pragma once

#include "sm90.h"

namespace emulator {

// The map is the fields themselves.
inline void encode(void* map, const fastres::TensorMapFields& f) {
  const auto need = [](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("the driver would refuse the tensor map: ") + what);
  };
  const bool im2col = f.traversal[0] != 0;
  need(reinterpret_cast<uintptr_t>(map) % 64 == 0, "the map itself lies at no multiple of 64");
  need(f.rank >= (im2col ? 3 : 1) && f.rank <= 5, "rank");
  need(reinterpret_cast<uintptr_t>(f.base) % 16 == 0, "address no multiple of 16");
  for (int d = 0; d < f.rank; ++d) need(f.size[d] >= 1 && f.size[d] <= uint64_t{1} << 32, "size");
  for (int d = 0; d + 1 < f.rank; ++d)
    need(f.stride[d] % 16 == 0 && f.stride[d] < uint64_t{1} << 40, "stride no multiple of 16");
  need(f.box[0] * 2 <= 128, "box wider than the swizzle");
  need(f.box[0] * 2 % 16 == 0, "rows of the box no multiple of 16 bytes");
  std::memcpy(map, &f, sizeof f);
  if (!im2col) {
    for (int d = 0; d < f.rank; ++d) {
      need(f.step[d] >= 1 && f.step[d] <= 8, "element stride");
      need(f.box[d] >= 1 && f.box[d] * f.step[d] <= 256, "box");
    }
    return;
  }
  need(f.rank == 4, "only [n, h, w, c] is emulated");
  need(f.box[1] >= 1 && f.box[1] <= 1024, "pixels per column");
  for (int d = 0; d < 2; ++d) {
    need(f.traversal[d] >= 1 && f.traversal[d] <= 8, "traversal stride");
    need(static_cast<int64_t>(f.size[1 + d]) - 1 + f.upper[d] >= f.lower[d], "empty bounding box");
  }
}

}  // namespace emulator
