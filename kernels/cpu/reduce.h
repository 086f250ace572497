// Sums per channel that do not depend on the number of threads: the cut into chunks and tiles follows from
// the shape alone, tiles are summed in the accumulation type, everything above them in fp64, always in the
// same order.
#pragma once

#include <algorithm>
#include <memory>

#include "tensor.h"

namespace fastres {

// Rows of channels: a chunk is one thread's work and has its own partial sums, a tile stays in the cache.
struct Chunks {
  int64_t rows, tile, count;
};

inline Chunks chunks_of(const Dense& d, int64_t element_bytes) {
  constexpr int64_t kTileBytes = 65536, kMaxChunks = 64, kMinRows = 32;
  const int64_t tile = std::clamp(kTileBytes / (d.c * element_bytes), int64_t{8}, int64_t{64});
  const int64_t wanted = std::max(kMinRows, (d.rows() + kMaxChunks - 1) / kMaxChunks);
  const int64_t rows = (wanted + tile - 1) / tile * tile;
  return {rows, tile, (d.rows() + rows - 1) / rows};
}

// Ask for the cache line of vector `u` of a block. Hardware does not foresee the walk down a block's rows.
template <class T>
inline void prefetch(const T* p, int u) {
  if (u * kLanes<Acc<T>> * sizeof(T) % 64 == 0) __builtin_prefetch(p, 0, 2);
}

// f(width tag, first channel, lanes): all channels, several vectors at a time where there are enough.
template <class A, class F>
void for_channel_blocks(int64_t channels, const F& f) {
  constexpr int64_t W = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * W <= channels; c += 4 * W) f(std::integral_constant<int, 4>{}, c, Full{});
  for (; c + W <= channels; c += W) f(std::integral_constant<int, 1>{}, c, Full{});
  if (c < channels) f(std::integral_constant<int, 1>{}, c, Tail{static_cast<int>(channels - c)});
}

// The same of planes: f(first, last, from, to) for tiles of one channel, about `size` numbers each, that are
// either several whole planes [first, last) or a piece [from, to) of one.
template <class F>
void for_plane_tiles(const Dense& d, int64_t size, const F& f) {
  if (d.s > size) {
    for (int64_t n = 0; n < d.n; ++n)
      for (int64_t from = 0; from < d.s; from += size) f(n, n + 1, from, std::min(from + size, d.s));
  } else if (d.s > 0) {
    const int64_t planes = size / d.s;
    for (int64_t n = 0; n < d.n; n += planes) f(n, std::min(n + planes, d.n), int64_t{0}, d.s);
  }
}

}  // namespace fastres
