// Sums per channel that do not depend on the number of threads: the cut into chunks and tiles follows from the
// shape alone, tiles are summed in the accumulation type, everything above them in fp64, always in the same order.
#pragma once

#include <algorithm>
#include <memory>

#include "tensor.h"

namespace fastres {

// Rows of channels: a chunk is one thread's work and has its own partial sums, a tile of it stays in the L1 cache.
struct Chunks {
  int64_t rows, tile, count;
};

inline Chunks chunks_of(const Dense& d, int64_t element_bytes) {
  constexpr int64_t kTileBytes = 16384, kMaxChunks = 64, kMinRows = 32;
  const int64_t tile = std::clamp(kTileBytes / (d.c * element_bytes), int64_t{8}, int64_t{64});
  const int64_t wanted = std::max(kMinRows, (d.rows() + kMaxChunks - 1) / kMaxChunks);
  const int64_t rows = (wanted + tile - 1) / tile * tile;
  return {rows, tile, (d.rows() + rows - 1) / rows};
}

// for_each(width tag, first channel, lanes): all channels, several vectors at a time where there are enough.
template <class A, class F>
void for_channel_blocks(int64_t channels, const F& f) {
  constexpr int64_t W = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * W <= channels; c += 4 * W) f(std::integral_constant<int, 4>{}, c, Full{});
  for (; c + W <= channels; c += W) f(std::integral_constant<int, 1>{}, c, Full{});
  if (c < channels) f(std::integral_constant<int, 1>{}, c, Tail{static_cast<int>(channels - c)});
}

}  // namespace fastres
