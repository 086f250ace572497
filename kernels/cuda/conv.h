// A convolution as a matrix product: pixels x (taps and channels) times filters. Everything here is plain arithmetic,
// the same on both sides, and tests/kernels/cuda/test_host_arithmetic.py holds it against brute force.
#pragma once

#include "launch.h"

namespace fastres {

// Division by a number that the host knows, of what is at least 0 and below 2^31: a product and a shift (Granlund and
// Montgomery 1994, figure 4.1) instead of twenty instructions.
struct Divisor {
  uint32_t by, multiplier, shift;

  FASTRES_BOTH static constexpr Divisor of(int by) {
    const uint64_t d = static_cast<uint64_t>(by);
    uint32_t shift = 0;
    while (uint64_t{1} << shift < d) ++shift;
    return {static_cast<uint32_t>(by), static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1), shift};
  }
};
FASTRES_BOTH constexpr int operator/(int n, const Divisor& d) {
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * d.multiplier >> 32);
  return static_cast<int>((high + static_cast<uint32_t>(n)) >> d.shift);
}
FASTRES_BOTH constexpr int operator%(int n, const Divisor& d) { return n - n / d * static_cast<int>(d.by); }

struct ConvShape {
  int n, h, w, c;  // input [n, h, w, c]
  int p, q, k;     // output [n, p, q, k]
  int r, s;        // filters [k, r, s, c / groups]
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;

  FASTRES_BOTH constexpr int group_c() const { return c / groups; }
  FASTRES_BOTH constexpr int group_k() const { return k / groups; }
  FASTRES_BOTH constexpr int depth() const { return r * s * group_c(); }  // products behind an output element
  FASTRES_BOTH constexpr int64_t pixels() const { return static_cast<int64_t>(n) * p * q; }
};

// An output pixel's window: offset of its first tap in the input, in pixels, and that tap's row and column (negative in
// the padding).
struct Window {
  int64_t offset;
  int row, column;
};
FASTRES_BOTH constexpr Window window_of(const ConvShape& v, int pixel) {
  const int image = pixel / (v.p * v.q), in_image = pixel - image * (v.p * v.q);
  const int p = in_image / v.q, q = in_image - p * v.q;
  const int row = p * v.stride_h - v.pad_h, column = q * v.stride_w - v.pad_w;
  return {(static_cast<int64_t>(image) * v.h + row) * v.w + column, row, column};
}

// Where an element of depth lies: filter row and column, channel in the group.
struct Tap {
  int r, s, c;

  FASTRES_BOTH static constexpr Tap of(const ConvShape& v, int depth) {
    const int cell = depth / v.group_c();
    return {cell / v.s, cell % v.s, depth % v.group_c()};
  }
  FASTRES_BOTH constexpr void advance(const ConvShape& v, int by) {
    c += by;
    while (c >= v.group_c()) {
      c -= v.group_c();
      if (++s == v.s) s = 0, ++r;
    }
  }
  // Inside the filter, and inside the image for the window at (row, column).
  FASTRES_BOTH constexpr bool valid(const ConvShape& v, int row, int column) const {
    return r < v.r && static_cast<unsigned>(row + r * v.dilation_h) < static_cast<unsigned>(v.h) &&
           static_cast<unsigned>(column + s * v.dilation_w) < static_cast<unsigned>(v.w);
  }
  // From the window's first element to this one, in elements.
  FASTRES_BOTH constexpr int64_t offset(const ConvShape& v) const {
    return (static_cast<int64_t>(r) * v.dilation_h * v.w + s * v.dilation_w) * v.c + c;
  }
};

// The blocks of a launch: parts of the depth innermost, then filters, groups, pixels.
struct ConvTiles {
  int block_m, block_n, tiles_m, tiles_n, groups, splits;

  FASTRES_BOTH constexpr int64_t tiles() const { return static_cast<int64_t>(tiles_m) * tiles_n * groups; }
  FASTRES_BOTH constexpr int64_t blocks() const { return tiles() * splits; }
  FASTRES_BOTH static constexpr ConvTiles of(const ConvShape& v, int block_m, int block_n, int splits) {
    return {block_m, block_n, static_cast<int>(ceil_div(v.pixels(), block_m)),
            static_cast<int>(ceil_div(v.group_k(), block_n)), v.groups, splits};
  }
};
struct ConvTile {
  int tile, split, group, first_pixel, first_filter;  // first_filter: in the group

  FASTRES_BOTH static constexpr ConvTile of(const ConvTiles& t, int block) {
    ConvTile at{};
    at.tile = block / t.splits;
    at.split = block - at.tile * t.splits;
    const int column = at.tile % (t.tiles_n * t.groups);
    at.group = column / t.tiles_n;
    at.first_filter = column % t.tiles_n * t.block_n;
    at.first_pixel = at.tile / (t.tiles_n * t.groups) * t.block_m;
    return at;
  }
};

// Steps [begin, end) of `steps` for part `part` of `parts`; sizes differ by at most one.
struct Range {
  int begin, end;
};
FASTRES_BOTH constexpr Range part_of(int steps, int part, int parts) {
  return {static_cast<int>(static_cast<int64_t>(steps) * part / parts),
          static_cast<int>(static_cast<int64_t>(steps) * (part + 1) / parts)};
}

// The taps [begin, end) of one axis that lie inside an image of `extent` for at least one of `count` outputs from `first`
// on. (Where the stride exceeds the image, one that lies inside for none may be among them; it adds zeros.)
FASTRES_BOTH constexpr Range taps_inside(int first, int count, int taps, int stride, int pad, int dilation, int extent) {
  const int low = first * stride - pad, high = low + (count - 1) * stride;
  const auto over = [dilation](int n) { return dilation == 1 ? n : n / dilation; };  // most have 1: spare the division
  const int begin = high < 0 ? over(dilation - 1 - high) : 0;
  const int end = low < extent ? over(extent - 1 - low) + 1 : 0;
  const int capped = end < taps ? end : taps;
  return {begin, capped > begin ? capped : begin};
}

// A row of shared memory is 64 bytes, four 16-byte chunks. Chunks are permuted so that the eight rows which ldmatrix
// reads at once lie in different banks.
constexpr int kRowBytes = 64;
FASTRES_BOTH constexpr int swizzle_64(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row >> 1)) & 3) * 16; }

struct ConvBnAct {
  ConvShape shape;
  ConvTiles tiles;
  const void *x, *weight, *residual;  // weight: rows of weight_row elements
  const float *scale, *shift;
  void* out;
  float* partial;  // [tiles, splits, block_m, block_n] where splits > 1
  int* counters;   // [tiles], zero
  int weight_row, act;
  float act_param;
};

// block_m, block_n: one of the kernel's tiles (128 x 128, 128 x 64, 64 x 64). Throws std::invalid_argument.
Record sm80_conv_record(ConvBnAct p, Type type, int block_m, int block_n, int splits);

}  // namespace fastres
