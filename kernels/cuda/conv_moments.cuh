// The batch statistics of a convolution's channels, from the accumulators of sm90_conv_bn_act: of every run of pixels that
// a group of warps holds, how many there are, their mean and the sum of squared deviations from it, in fp32 and before
// rounding. any_bn_reduce.cu merges the runs. Which block takes a tile does not matter: the bits are the same every time.
//
// All values are in registers, so the mean comes first and the deviations are from it: nothing cancels. Three
// instructions an element; threads meet (four have a filter's pixels) once a run.
#pragma once

#include <algorithm>

#include "ptx_cluster.cuh"
#include "sm90_conv.h"

namespace fastres {
namespace {

// Of filters `filter` + 64 m + 8 half (the thread's own) and a run of 2 kSums pixels from `pixel` on.
template <bool kHalo, int kBlocks, int kSums>
FASTRES_DEVICE void write_moments(const Sm90Conv& p, const float (&sum)[kBlocks][kSums], int filter, int pixel, int lane) {
  constexpr int kColumns = 2 * kSums;
  // Pixels that exist, of each of so many rows.
  int rows = 1, columns = p.pixels - pixel;
  constexpr int kRow = kHalo ? kHaloRow : kColumns;
  if constexpr (kHalo) {
    const auto place = HaloPlace::of(p, pixel);
    rows = p.p - place.h, columns = (p.images - place.n) * p.q;
  } else if (p.span) {
    columns = p.images - Position::of(p, pixel).n;
  }
  rows = rows < kColumns / kRow ? rows : kColumns / kRow, columns = columns < kRow ? columns : kRow;
  const int count = rows > 0 && columns > 0 ? rows * columns : 0;
  // Of a filter's values, every other pair, those of pixels that exist; both of a pair have a total of their own. The
  // accumulators stay as they are: ptxas would serialise the products of a kernel that writes to them.
  const auto add_up = [&](float (&total)[kBlocks][2], const auto& term) {
    const auto all = [&](const auto& exists) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float each[2] = {};
#pragma unroll
          for (int i = half * 2; i < kSums; i += 4)
#pragma unroll
            for (int j = 0; j < 2; ++j)
              each[j] = exists(i + j) ? term(each[j], sum[m][i + j], m, half) : each[j];
          float v = each[0] + each[1];
          v += ptx::shuffle_xor(v, 1);
          total[m][half] = v + ptx::shuffle_xor(v, 2);
        }
    };
    if (count == kColumns) {
      all([](int) { return true; });
    } else {
      all([&](int i) {
        return i / 4 * 8 % kRow + lane % 4 * 2 + i % 2 < columns && i / 4 * 8 / kRow < rows;
      });
    }
  };

  float mean[kBlocks][2], m2[kBlocks][2];
  add_up(mean, [](float total, float v, int, int) { return total + v; });
  const float inverse = count ? 1.0f / static_cast<float>(count) : 0.0f;
#pragma unroll
  for (auto& pair : mean) pair[0] *= inverse, pair[1] *= inverse;
  add_up(m2, [&](float total, float v, int m, int half) {
    const float away = v - mean[m][half];
    return total + away * away;
  });

  // Of four threads with the same filter each writes one number.
  const int which = lane % 4;
  float* to = p.moments + static_cast<int64_t>(pixel / kColumns) * p.k * 3 + which;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = filter + m * 64 + half * 8;
      if (which < 3 && at < p.k)
        to[at * 3] = which == 0 ? static_cast<float>(count) : which == 1 ? mean[m][half] : m2[m][half];
    }
}

}  // namespace
}  // namespace fastres
