// Boxes of output pixels and the taps that they need: the small-batch convolution's arithmetic, plain, the same on both
// sides.
#pragma once

#include "conv.h"
#include "sm90.h"

namespace fastres {

constexpr int kLatencyDepth = 64;  // channels a step: a 128-byte row

// The blocks of a launch: parts of the depth innermost, then filters, groups, boxes of output pixels. A box's input
// pixels at one tap are a box too, so that one TMA load brings them, and a box at the image's edge can do without the
// taps that lie in the padding for all of it.
struct ConvBoxes {
  int images, rows, columns;        // of a box
  int filters;                      // of a block
  int boxes_n, boxes_p, boxes_q;    // of them
  int filter_tiles, groups, parts;

  FASTRES_BOTH constexpr int pixels() const { return images * rows * columns; }
  FASTRES_BOTH constexpr int64_t blocks() const {
    return static_cast<int64_t>(boxes_n) * boxes_p * boxes_q * filter_tiles * groups * parts;
  }
  FASTRES_BOTH static constexpr ConvBoxes of(const ConvShape& v, int images, int rows, int columns, int filters,
                                              int parts) {
    return {images, rows, columns, filters,
            static_cast<int>(ceil_div(v.n, images)), static_cast<int>(ceil_div(v.p, rows)),
            static_cast<int>(ceil_div(v.q, columns)), static_cast<int>(ceil_div(v.group_k(), filters)),
            v.groups, parts};
  }
};
struct ConvBox {
  int part, group, first_filter, n, p, q;  // first_filter: in the group; n, p, q: the first pixel

  FASTRES_BOTH static constexpr ConvBox of(const ConvBoxes& b, int block) {
    ConvBox at{};
    at.part = block % b.parts, block /= b.parts;
    at.first_filter = block % b.filter_tiles * b.filters, block /= b.filter_tiles;
    at.group = block % b.groups, block /= b.groups;
    at.q = block % b.boxes_q * b.columns, block /= b.boxes_q;
    at.p = block % b.boxes_p * b.rows, block /= b.boxes_p;
    at.n = block * b.images;
    return at;
  }
  // Of the box's pixel `m`, in the output; -1 where there is none.
  FASTRES_BOTH constexpr int64_t pixel(const ConvShape& v, const ConvBoxes& b, int m) const {
    const int row = m / b.columns, image = row / b.rows;
    const int i = n + image, y = p + row - image * b.rows, x = q + m - row * b.columns;
    if (image >= b.images || i >= v.n || y >= v.p || x >= v.q) return -1;
    return (static_cast<int64_t>(i) * v.p + y) * v.q + x;
  }
};

// A box's steps of depth: the taps that it needs, row by row, each in chunks of 64 channels.
struct Taps {
  Range r, s;
  int chunks;

  FASTRES_BOTH static constexpr Taps of(const ConvShape& v, const ConvBoxes& b, const ConvBox& at) {
    const int rows = v.p - at.p < b.rows ? v.p - at.p : b.rows, columns = v.q - at.q < b.columns ? v.q - at.q : b.columns;
    return {taps_inside(at.p, rows, v.r, v.stride_h, v.pad_h, v.dilation_h, v.h),
            taps_inside(at.q, columns, v.s, v.stride_w, v.pad_w, v.dilation_w, v.w),
            static_cast<int>(ceil_div(v.group_c(), kLatencyDepth))};
  }
  FASTRES_BOTH constexpr int steps() const { return (r.end - r.begin) * (s.end - s.begin) * chunks; }
  struct Step {
    int r, s, chunk;
  };
  FASTRES_BOTH constexpr Step step(int i) const {
    const int tap = i / chunks, width = s.end - s.begin;
    return {r.begin + tap / width, s.begin + tap % width, i % chunks};
  }
};

// With `second`, a 1x1 convolution of another tensor to the same outputs is added: its depth follows the first one's.
// weight: [K, R * S * chunks * 64 + C2], a tap's channels padded with zeros to whole chunks.
struct LatencyConv {
  ConvBnAct conv;
  ConvShape second_shape;
  const void* second;
};
FASTRES_BOTH constexpr int latency_weight_row(const ConvShape& v, int second_channels) {
  return v.r * v.s * static_cast<int>(round_up(v.group_c(), kLatencyDepth)) + second_channels;
}
// A box of at most 128 pixels; filters: 64 or 128 a block; cluster: 1, 2, 4 or 8 blocks that share the depth. Throws
// std::invalid_argument.
Record sm90_conv_latency_record(const LatencyConv& p, Type type, int images, int rows, int columns, int filters,
                                int cluster);

}  // namespace fastres
