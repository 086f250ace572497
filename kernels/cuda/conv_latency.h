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
  Divisor rows, columns;                  // of a box
  Divisor boxes_p, boxes_q, filter_tiles, groups, parts;
  Divisor chunks;                         // of 64 channels
  int images, filters, boxes_n;           // of a box, of a block, of boxes

  FASTRES_BOTH constexpr int pixels() const { return images * static_cast<int>(rows.by * columns.by); }
  FASTRES_BOTH constexpr int64_t blocks() const {
    return static_cast<int64_t>(boxes_n) * boxes_p.by * boxes_q.by * filter_tiles.by * groups.by * parts.by;
  }
  FASTRES_BOTH static constexpr ConvBoxes of(const ConvShape& v, int images, int rows, int columns, int filters,
                                              int parts) {
    const auto pieces = [](int64_t extent, int of) { return Divisor::of(static_cast<int>(ceil_div(extent, of))); };
    return {Divisor::of(rows),
            Divisor::of(columns),
            pieces(v.p, rows),
            pieces(v.q, columns),
            pieces(v.group_k(), filters),
            Divisor::of(v.groups),
            Divisor::of(parts),
            pieces(v.group_c(), kLatencyDepth),
            images,
            filters,
            static_cast<int>(ceil_div(v.n, images))};
  }
  // Steps [begin, end) of `steps` (below 2^27) for part `part`; sizes differ by at most one.
  FASTRES_BOTH constexpr Range part(int steps, int part) const {
    return {steps * part / parts, steps * (part + 1) / parts};
  }
};
struct ConvBox {
  int part, group, first_filter, n, p, q;  // first_filter: in the group; n, p, q: the first pixel

  FASTRES_BOTH static constexpr ConvBox of(const ConvBoxes& b, int block) {
    ConvBox at{};
    const auto take = [&block](const Divisor& d) {
      const int rest = block % d;
      block = block / d;
      return rest;
    };
    at.part = take(b.parts);
    at.first_filter = take(b.filter_tiles) * b.filters;
    at.group = take(b.groups);
    at.q = take(b.boxes_q) * static_cast<int>(b.columns.by);
    at.p = take(b.boxes_p) * static_cast<int>(b.rows.by);
    at.n = block * b.images;
    return at;
  }
  // Of the box's pixel `m`, in the output; -1 where there is none.
  FASTRES_BOTH constexpr int pixel(const ConvShape& v, const ConvBoxes& b, int m) const {
    const int row = m / b.columns, image = row / b.rows;
    const int i = n + image, y = p + row - image * static_cast<int>(b.rows.by);
    const int x = q + m - row * static_cast<int>(b.columns.by);
    if (image >= b.images || i >= v.n || y >= v.p || x >= v.q) return -1;
    return (i * v.p + y) * v.q + x;
  }
};

// A box's steps of depth: the taps that it needs, row by row, each in chunks of 64 channels.
struct Taps {
  Range r, s;
  Divisor chunks;

  FASTRES_BOTH static constexpr Taps of(const ConvShape& v, const ConvBoxes& b, const ConvBox& at) {
    const int rows = static_cast<int>(b.rows.by), columns = static_cast<int>(b.columns.by);
    const int height = v.p - at.p < rows ? v.p - at.p : rows, width = v.q - at.q < columns ? v.q - at.q : columns;
    return {taps_inside(at.p, height, v.r, v.stride_h, v.pad_h, v.dilation_h, v.h),
            taps_inside(at.q, width, v.s, v.stride_w, v.pad_w, v.dilation_w, v.w), b.chunks};
  }
  FASTRES_BOTH constexpr int steps() const { return (r.end - r.begin) * (s.end - s.begin) * static_cast<int>(chunks.by); }
  struct Step {
    int r, s, chunk;
  };
  FASTRES_BOTH constexpr Step step(int i) const {
    const int tap = i / chunks, width = s.end - s.begin;
    int row = r.begin, column = tap;
    while (column >= width) column -= width, ++row;  // a filter has few rows
    return {row, s.begin + column, i - tap * static_cast<int>(chunks.by)};
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
