// Tiles, steps, shared memory and tensor maps of sm90_conv_bn_act. Plain arithmetic, held against brute force by
// tests/kernels/cuda/test_host_arithmetic.py.
#pragma once

#include <algorithm>

#include "conv.h"
#include "sm90.h"

namespace fastres {

// One of the tensors whose products make a sum: pixels seen through a filter.
struct ConvSource {
  int r, s, c_steps;  // taps, and steps of 64 channels a tap
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int plain;  // a 1x1 that takes every pixel: its map is a matrix [pixels, c], no im2col

  FASTRES_BOTH constexpr int steps() const { return r * s * c_steps; }
};

struct Sm90Conv {
  TensorMap x, weight, second, second_weight, residual, out;
  ConvSource source[2];
  const float *scale, *shift;
  const void* residual_rows;  // null: none
  void* out_rows;
  float* moments;              // training: [chunks, k, 3] (conv_moments.cuh); null: none
  int* counter;                // zero: how many tiles were taken beyond the first one of every cluster
  int p, q, k, pixels, steps;  // steps: of both sources
  int tiles_k, tiles, clusters, cluster;
  int stages, slots, ticks;
  int halo_images, halo_rows;  // of the halo form: images side by side in a row of pixels, rows of a group of them
  int images, h, w, span;      // of the position form: how many, their size, pixels counted a position; span 0: another
  Eviction pixels_eviction, filters_eviction, out_eviction;  // out: the residual's too
  int by_tma;  // rows of k channels are whole 16 bytes: residual and output travel by TMA
  int act;
  float act_param;
};

constexpr int kConvDepth = 64;    // channels a step: a 128-byte row
constexpr int kConvChunk = 64;    // filters that leave together, and pixels (56 in the halo form)
constexpr int kChunkBytes = kConvChunk * kSwizzleRow;
constexpr int kHaloRow = 56;      // pixels: 1 x 56, 2 x 28, 4 x 14, 8 x 7; a shift by a row keeps the swizzle's phase
static_assert(kHaloRow * kSwizzleRow % 1024 == 0);
constexpr int kConvGroups = 2;    // of four warps, that multiply
constexpr int kMaxStages = 8, kMaxSlots = 4, kMaxTicks = 4, kHaloBoxes = 2;

// A step of the depth: 64 channels of one tap of one source. Channels innermost, then columns, rows, sources; in the halo
// form rows innermost, which share a box of pixels, then channels, columns.
struct ConvStep {
  int source, r, s, c;  // c: in steps
  Range rows, columns;  // taps of the first source

  FASTRES_BOTH constexpr void advance(const Sm90Conv& v) {
    const ConvSource& of = v.source[source];
    if (v.halo_images) {
      if (++r < of.r) return;
      r = 0;
      if (++c < of.c_steps) return;
      c = 0, ++s;
      return;
    }
    if (++c < of.c_steps) return;
    c = 0;
    if (++s < (source ? of.s : columns.end)) return;
    s = source ? 0 : columns.begin;
    if (++r < (source ? of.r : rows.end)) return;
    r = s = 0, ++source;
  }
};

// What a block computes of a cluster's tile: the blocks of a cluster have the same filters and neighbouring pixels.
// Filters innermost: pixels are read again while they are in the L2.
struct Sm90ConvTile {
  int first_pixel, first_filter;

  FASTRES_BOTH static constexpr Sm90ConvTile of(const Sm90Conv& v, int tile, int rank, int filters, int pixels) {
    return {(tile / v.tiles_k * v.cluster + rank) * pixels, tile % v.tiles_k * filters};
  }
};

// Where the window of an output pixel begins: column, row, image. A pixel beyond the last one has an image that does
// not exist, which reads as zeros.
struct WindowStart {
  int w, h, n;

  FASTRES_BOTH static constexpr WindowStart of(const Sm90Conv& v, const ConvSource& from, int pixel) {
    const int row = pixel / v.q, image = row / v.p;
    return {(pixel - row * v.q) * from.stride_w - from.pad_w, (row - image * v.p) * from.stride_h - from.pad_h, image};
  }
};

// The halo form, for 3x3 with stride 1 and padding 1: pixels are counted in rows of kHaloRow, which are the same row of
// halo_images neighbouring images; a tile is some rows of one group of images. Rows and images that do not exist read
// as zeros and are not written.
struct HaloPlace {
  int n, h;

  FASTRES_BOTH static constexpr HaloPlace of(const Sm90Conv& v, int pixel) {
    const int row = pixel / kHaloRow, group = row / v.halo_rows;
    return {group * v.halo_images, row - group * v.halo_rows};
  }
};

// The position form: pixels are counted image by image at one position of the output, so that the taps that lie in the
// padding lie there for all of a tile, and are left out. The first row comes last but for a pixel, behind the last one: its
// tiles, which have fewer taps, fill the gaps that longer ones leave.
struct Position {
  int n, at;  // at: row by row

  FASTRES_BOTH static constexpr Position of(const Sm90Conv& v, int pixel) {
    const int position = pixel / v.span, at = position + v.q + 1;
    return {pixel - position * v.span, at % (v.p * v.q)};
  }
  FASTRES_BOTH constexpr WindowStart window(const Sm90Conv& v) const {
    const ConvSource& from = v.source[0];
    const int row = at / v.q;
    return {(at - row * v.q) * from.stride_w - from.pad_w, row * from.stride_h - from.pad_h, n};
  }
};

// What a tile goes through: its first step, and how many.
struct ConvDepth {
  ConvStep first;
  int steps;

  FASTRES_BOTH static constexpr ConvDepth of(const Sm90Conv& v, int first_pixel) {
    const ConvSource& from = v.source[0];
    if (!v.span) return {{0, 0, 0, 0, {0, from.r}, {0, from.s}}, v.steps};
    const int at = Position::of(v, first_pixel).at, row = at / v.q;
    const Range r = taps_inside(row, 1, from.r, from.stride_h, from.pad_h, from.dilation_h, v.h);
    const Range s = taps_inside(at - row * v.q, 1, from.s, from.stride_w, from.pad_w, from.dilation_w, v.w);
    return {{0, r.begin, s.begin, 0, r, s}, (r.end - r.begin) * (s.end - s.begin) * from.c_steps};
  }
};

// A tile of `filters` x `pixels` outputs, and how its two groups of warps share it: 64 filters by pixels, others by
// filters. 128 x 224 and 64 x 448 are of the halo form, where a box of pixels, with the rows above and below, stays for
// three steps and has a ring of its own.
struct ConvTileShape {
  int filters, pixels;

  FASTRES_BOTH constexpr bool halo() const { return pixels % kHaloRow == 0; }
  FASTRES_BOTH constexpr bool takes_positions() const { return !halo() && filters <= 128; }
  FASTRES_BOTH constexpr int chunk_pixels() const { return halo() ? kHaloRow : kConvChunk; }
  FASTRES_BOTH constexpr bool share_pixels() const { return filters < 64 * kConvGroups; }
  FASTRES_BOTH constexpr int group_filters() const { return share_pixels() ? filters : filters / kConvGroups; }
  FASTRES_BOTH constexpr int group_pixels() const { return share_pixels() ? pixels / kConvGroups : pixels; }
  FASTRES_BOTH constexpr int filters_bytes() const { return filters * kSwizzleRow; }
  FASTRES_BOTH constexpr int pixels_bytes() const { return (halo() ? pixels + 2 * kHaloRow : pixels) * kSwizzleRow; }
  FASTRES_BOTH constexpr int stage_bytes() const { return filters_bytes() + (halo() ? 0 : pixels_bytes()); }
};

// Offsets into shared memory: boxes of the halo form, stages (filters, then pixels), the groups' slots, mbarriers,
// tickets.
struct ConvLayout {
  int stages, slots, barriers, ticks, bytes;

  FASTRES_BOTH static constexpr ConvLayout of(const ConvTileShape& tile, int stages, int slots) {
    ConvLayout l{};
    l.stages = tile.halo() ? kHaloBoxes * tile.pixels_bytes() : 0;
    l.slots = l.stages + stages * tile.stage_bytes();
    l.barriers = l.slots + kConvGroups * slots * kChunkBytes;
    l.ticks = l.barriers + 8 * 2 * (kMaxStages + kConvGroups * kMaxSlots + kMaxTicks + kHaloBoxes);
    l.bytes = l.ticks + 4 * kMaxTicks;
    return l;
  }
};
constexpr int kLastSimple = 1;  // identity and ReLU, by their codes
// What becomes of the sums: identity or ReLU, unrolled; any activation, its code once, the sums moving past it; in
// training neither scale nor shift, but the statistics of every channel.
enum class ConvFinish { kSimple, kGeneral, kStatistics };
constexpr int kSharedBytes = 227 * 1024;  // a block of Hopper may have them

// As many stages as fit beside the slots.
constexpr int conv_stages(const ConvTileShape& tile, int slots) {
  int stages = kMaxStages;
  while (ConvLayout::of(tile, stages, slots).bytes > kSharedBytes) --stages;
  return stages;
}

// A chunk of the residual that has no slot while a tile multiplies is waited for when it is added. Shallow sums end often and
// shall have all of them ahead, deep ones what leaves them the stages that cover their own loads.
constexpr int residual_slots(const ConvTileShape& tile, int steps) {
  constexpr int kEnough = 4;
  if (steps <= 8 && !tile.halo()) return kMaxSlots;
  int slots = kMaxSlots;
  while (slots > 2 && conv_stages(tile, slots) < kEnough) --slots;
  return slots;
}

// What a 1x1 needs in order to be a plain matrix.
constexpr bool is_plain(const ConvShape& v) {
  return v.r == 1 && v.s == 1 && v.stride_h == 1 && v.stride_w == 1 && v.pad_h == 0 && v.pad_w == 0;
}

// With `second`, a 1x1 convolution of another tensor to the same outputs is added: [k, second_shape.c] weights.
struct ThroughputConv {
  ConvBnAct conv;
  ConvShape second_shape;
  const void *second, *second_weight;
  bool by_position;  // pixels in the order of Position
  float* moments;  // training: the convolution alone, and the statistics of its channels, [sm90_conv_chunks, k, 3]
};
inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

inline ConvSource source_of(const ConvShape& v) {
  return {v.r,     v.s,     static_cast<int>(ceil_div(v.c, kConvDepth)), v.stride_h, v.stride_w, v.pad_h, v.pad_w,
          v.dilation_h, v.dilation_w, is_plain(v)};
}

inline bool takes_halo(const ConvShape& v, const ThroughputConv& t) {
  return v.r == 3 && v.s == 3 && v.stride_h == 1 && v.stride_w == 1 && v.pad_h == 1 && v.pad_w == 1 &&
         v.dilation_h == 1 && v.dilation_w == 1 && kHaloRow % v.w == 0 && v.k % 8 == 0 && t.conv.act <= kLastSimple &&
         !t.second;
}

// Of tensors beyond the L2 nothing will be found there again: what is read or written once leaves first, and the filters
// that every tile asks for leave last. Where tensors fit, the next layer finds them, and all are alike.
inline void set_evictions(Sm90Conv& p, const ConvShape& v) {
  constexpr int64_t kL2Bytes = int64_t{50} << 20;
  const int64_t x = int64_t{2} * v.n * v.h * v.w * v.c, out = 2 * v.pixels() * v.k;
  if (x > kL2Bytes && v.r == 1 && v.s == 1 && p.tiles_k == 1) p.pixels_eviction = Eviction::kFirst;
  if (out > kL2Bytes) p.out_eviction = Eviction::kFirst;
  if (x + out > 2 * kL2Bytes) p.filters_eviction = Eviction::kLast;
}

// Every output has a tap inside the image.
inline bool touches_everywhere(const Sm90Conv& p) {
  const ConvSource& from = p.source[0];
  const auto touches = [](int outputs, int taps, int stride, int pad, int dilation, int extent) {
    for (int i = 0; i < outputs; ++i) {
      const Range inside = taps_inside(i, 1, taps, stride, pad, dilation, extent);
      if (inside.end <= inside.begin) return false;
    }
    return true;
  };
  return touches(p.p, from.r, from.stride_h, from.pad_h, from.dilation_h, p.h) &&
         touches(p.q, from.s, from.stride_w, from.pad_w, from.dilation_w, p.w);
}

// Everything but maps and pointers.
inline Sm90Conv sm90_conv_tiles(const ThroughputConv& t, int filters, int pixels, int cluster, int multiprocessors) {
  const ConvShape& v = t.conv.shape;
  const ConvTileShape tile{filters, pixels};
  require((filters == 128 && (pixels == 256 || pixels == 224 || pixels == 128)) || (filters == 256 && pixels == 128) ||
              (filters == 64 && (pixels == 256 || pixels == 448)),
          "tile: 128 x 256, 256 x 128, 128 x 128, 64 x 256, 128 x 224 and 64 x 448 filters x pixels are taken");
  require(cluster == 1 || cluster == 2, "cluster: 1 and 2 blocks are taken");
  require(v.groups == 1, "groups: one is taken");
  require(v.c % 8 == 0 && (!t.second || t.second_shape.c % 8 == 0), "channels must be a multiple of 8");
  require(v.pixels() < int64_t{1} << 30, "2^30 output pixels or more");
  Sm90Conv p{};
  p.source[0] = source_of(v);
  int64_t run = v.pixels();  // of pixels that tiles are cut from
  if (tile.halo()) {
    require(takes_halo(v, t), "tile: the halo form takes a 3x3 with stride 1, padding 1, images as wide as a divisor of "
                              "56, filters in eights, identity or ReLU");
    p.halo_images = kHaloRow / v.w;
    p.halo_rows = static_cast<int>(round_up(v.h, pixels / kHaloRow));
    run = ceil_div(v.n, p.halo_images) * p.halo_rows * kHaloRow;
  }
  p.p = v.p, p.q = v.q, p.k = v.k, p.pixels = static_cast<int>(v.pixels());
  p.images = v.n, p.h = v.h, p.w = v.w;
  if (t.by_position) {
    require(tile.takes_positions() && !t.second && v.k % 8 == 0 && touches_everywhere(p),
            "by_position: takes tiles of 64 and 128 filters without halo, one tensor, filters in eights, a tap inside the "
            "image for every output");
    p.span = static_cast<int>(round_up(v.n, pixels * cluster));
    run = int64_t{p.span} * v.p * v.q;
    require(run < int64_t{1} << 30, "2^30 output pixels or more");
  }
  p.steps = p.source[0].steps();
  if (t.second) {
    p.source[1] = source_of(t.second_shape);
    p.steps += p.source[1].steps();
  }
  p.by_tma = v.k % 8 == 0;
  p.cluster = cluster;
  p.tiles_k = static_cast<int>(ceil_div(v.k, filters));
  p.tiles = static_cast<int>(ceil_div(run, pixels * cluster)) * p.tiles_k;
  p.clusters = std::clamp(multiprocessors / cluster, 1, p.tiles);
  set_evictions(p, v);
  p.slots = t.conv.residual ? residual_slots(tile, p.steps) : 2;
  p.stages = conv_stages(tile, p.slots);
  // Tickets far enough ahead for the loader to fill all stages, and no further: what is taken early is not shared.
  p.ticks = std::clamp(static_cast<int>(ceil_div(p.stages, p.steps)) + 1, 2, kMaxTicks);
  return p;
}

// Runs of pixels that have statistics of their own: what a group of warps holds of a tile.
inline int sm90_conv_chunks(const Sm90Conv& p, const ConvTileShape& tile) {
  return p.tiles / p.tiles_k * p.cluster * (tile.share_pixels() ? kConvGroups : 1);
}

// Rows of channels, `rows` a box.
inline TensorMapFields matrix_fields(Type type, const void* base, int64_t pixels, int channels, int rows) {
  TensorMapFields f{type, 2, base};
  f.size[0] = static_cast<uint64_t>(channels), f.size[1] = static_cast<uint64_t>(pixels);
  f.stride[0] = uint64_t{2} * channels;
  f.box[0] = kConvDepth, f.box[1] = static_cast<uint32_t>(rows);
  return f;
}

// [n, h, w, channels] with images between columns and rows: `rows` rows of halo_images images a box.
inline TensorMapFields halo_fields(Type type, const void* base, const ConvShape& v, int channels, int rows) {
  TensorMapFields f{type, 4, base};
  const uint64_t row = uint64_t{2} * channels;
  const uint64_t size[] = {static_cast<uint64_t>(channels), static_cast<uint64_t>(v.w), static_cast<uint64_t>(v.n),
                           static_cast<uint64_t>(v.h)};
  const uint64_t stride[] = {row, row * v.w * v.h, row * v.w};
  const uint32_t box[] = {kConvDepth, static_cast<uint32_t>(v.w), static_cast<uint32_t>(kHaloRow / v.w),
                          static_cast<uint32_t>(rows)};
  std::copy_n(size, 4, f.size), std::copy_n(stride, 3, f.stride), std::copy_n(box, 4, f.box);
  return f;
}

// The input [n, h, w, c], `images` of one pixel a box.
inline TensorMapFields images_fields(Type type, const void* base, const ConvShape& v, int images) {
  TensorMapFields f{type, 4, base};
  const uint64_t row = uint64_t{2} * v.c;
  const uint64_t size[] = {static_cast<uint64_t>(v.c), static_cast<uint64_t>(v.w), static_cast<uint64_t>(v.h),
                           static_cast<uint64_t>(v.n)};
  const uint64_t stride[] = {row, row * v.w, row * v.w * v.h};
  const uint32_t box[] = {kConvDepth, 1, 1, static_cast<uint32_t>(images)};
  std::copy_n(size, 4, f.size), std::copy_n(stride, 3, f.stride), std::copy_n(box, 4, f.box);
  return f;
}
// The output as [position, n, k], images between positions and filters: kConvChunk of one position a box.
inline TensorMapFields positions_fields(Type type, const void* base, const ConvShape& v) {
  TensorMapFields f{type, 3, base};
  const uint64_t row = uint64_t{2} * v.k, positions = static_cast<uint64_t>(v.p) * v.q;
  f.size[0] = static_cast<uint64_t>(v.k), f.size[1] = static_cast<uint64_t>(v.n), f.size[2] = positions;
  f.stride[0] = row * positions, f.stride[1] = row;
  f.box[0] = kConvDepth, f.box[1] = kConvChunk, f.box[2] = 1;
  return f;
}

// The input, `pixels` windows a box. Throws where an im2col map does not reach as far as the filter.
inline TensorMapFields pixels_fields(Type type, const void* base, const ConvShape& v, int pixels) {
  if (is_plain(v)) return matrix_fields(type, base, v.pixels(), v.c, pixels);
  TensorMapFields f{type, 4, base};
  const uint64_t row = uint64_t{2} * v.c;
  const uint64_t size[] = {static_cast<uint64_t>(v.c), static_cast<uint64_t>(v.w), static_cast<uint64_t>(v.h),
                           static_cast<uint64_t>(v.n)};
  const uint64_t stride[] = {row, row * v.w, row * v.w * v.h};
  std::copy_n(size, 4, f.size), std::copy_n(stride, 3, f.stride);
  f.box[0] = kConvDepth, f.box[1] = static_cast<uint32_t>(pixels);
  const auto corners = [&](int d, int pad, int taps, int dilation, int step) {
    const int reach = dilation * (taps - 1), upper = pad - reach;
    require(pad <= 128 && upper >= -128 && upper <= 127 && reach <= 255,
            "padding and dilated filter: im2col maps reach 128 pixels");
    require(step <= 8, "stride: 1 to 8 are taken");
    f.lower[d] = static_cast<int8_t>(-pad), f.upper[d] = static_cast<int8_t>(upper);
    f.traversal[d] = static_cast<uint8_t>(step);
  };
  corners(0, v.pad_w, v.s, v.dilation_w, v.stride_w);
  corners(1, v.pad_h, v.r, v.dilation_h, v.stride_h);
  return f;
}

// filters x pixels: 128 x 256, 256 x 128, 128 x 128 or 64 x 256; 128 x 224 and 64 x 448 (halo form); cluster: 1 or 2 blocks that share the loads of weights;
// conv.counters: one, zero. Throws std::invalid_argument.
Record sm90_conv_record(const ThroughputConv& p, Type type, int filters, int pixels, int cluster);

}  // namespace fastres
