// Tiles, steps and shared memory of sm90_stem_pool; plain arithmetic.
#pragma once

#include "sm90.h"

namespace fastres {

// out = max_pool3x3/2(relu(scale * conv7x7/2(x) + shift)), paddings 3 and 1, 3 -> 64 channels.
struct StemPool {
  const void *x, *weight;              // weight: [kStemBlocks, 64, 48], see StemTap
  const float *constants, *normalize;  // (|scale|, shift) by channel; (factor, offset) of uint8 images, or null
  void* out;                           // [n, pooled_h, pooled_w, 64]
  int64_t stride_n;                    // of x, in elements
  int stride_c, stride_h, stride_w;
  int h, w, p, q, pooled_h, pooled_w;              // p, q: the convolution's extent
  int rows, tiles_h, tiles_w, tiles;               // rows: pooled rows a tile
  bool paired;                                     // planes, and two neighbouring columns load as one word
};

// A warp's 16 rows of the product are 16 neighbouring convolution columns: 7 pooled columns and the one that they share
// with the warp to the left. Warps therefore meet nowhere.
constexpr int kStemWarps = 8, kStemWarpColumns = 7, kStemColumns = kStemWarps * kStemWarpColumns;
constexpr int kStemChannels = 64;

struct StemTile {
  int n, row, rows, column;  // first pooled row, how many, first pooled column
  FASTRES_BOTH static constexpr StemTile of(const StemPool& p, int tile) {
    const int column = tile % p.tiles_w, row = tile / p.tiles_w % p.tiles_h * p.rows;
    const int rows = p.pooled_h - row < p.rows ? p.pooled_h - row : p.rows;
    return {tile / p.tiles_w / p.tiles_h, row, rows, column * kStemColumns};
  }
};

// --- Steps. Step s of a tile takes input rows 2 j - 1 and 2 j, j = stem_pair(s). They meet convolution rows j - 2 to
// j + 1; row j + d is accumulated in slot (s + d) % 4, and row j - 2 is complete after the step.
FASTRES_BOTH constexpr int stem_pair(const StemTile& at, int step) { return 2 * at.row - 2 + step; }
// The tile's convolution rows: 2 row - 1 (the pool's padding in the first tile) to 2 (row + rows) - 1.
FASTRES_BOTH constexpr int stem_steps(const StemTile& at) { return 2 * at.rows + 4; }
FASTRES_BOTH constexpr int stem_slot(int step, int d) { return (step + d) & 3; }
constexpr int kStemFirstRow = 3;  // the first step that completes a row of the tile

// Pairs of rows that lie in the image at all; the others are not loaded, and their products left out.
struct StemPairs {
  int first, count;
  FASTRES_BOTH static constexpr StemPairs of(const StemTile& at, int h) {
    const int begin = stem_pair(at, 0), last = stem_pair(at, stem_steps(at) - 1);
    const int first = begin < 0 ? 0 : begin, end = last < h / 2 ? last : h / 2;
    return {first, end - first + 1};
  }
  FASTRES_BOTH constexpr bool has(int pair) const { return pair >= first && pair < first + count; }
};

// --- Columns. A row of a tile in shared memory starts at this element of the image's row [w, 3].
FASTRES_BOTH constexpr int stem_first_element(int column) { return 12 * column - 16; }
constexpr int kStemRowWords = 352;
// Convolution column 2 * column - 1 + i, i = 14 * warp + c, has its window of 12 words at word 3 i: an element more on
// the left and two more on the right than the filter, where weights are zero.
FASTRES_BOTH constexpr int stem_word(int warp, int c) { return 3 * (2 * kStemWarpColumns * warp + c); }
// The column c of a warp's row `group` (lower half) or group + 8 (upper half). Within a half no two windows that a warp
// reads together lie 10 or 11 columns apart, which would be two words of one bank. Column 2 group is in the lower half
// of groups 0 to 3 and in the upper half of the others; its neighbour 2 group + 1 is in the other half of the partner,
// group ^ 4.
FASTRES_BOTH constexpr int stem_column(int group, bool upper) {
  return group < 4 ? (upper ? 2 * group + 9 : 2 * group) : (upper ? 2 * group : 2 * group - 7);
}
static_assert(stem_word(kStemWarps - 1, 15) + 12 <= kStemRowWords);

// --- Weights. Block b, 64 filters x 48, is for convolution row j + stem_distance(b). They stand one after the other,
// the first three once more, so that the four of a step are always neighbours, in the order of the slots.
constexpr int kStemBlocks = 4, kStemStanding = 2 * kStemBlocks - 1, kStemDepth = 48;
FASTRES_BOTH constexpr int stem_distance(int block) { return ((block + 2) & 3) - 2; }
FASTRES_BOTH constexpr int stem_first_block(int step) { return -step & 3; }
// The filter row that element `depth` of a block is of, and the element of it ([s, c], 21); -1: zero.
struct StemTap {
  int row, element;
  FASTRES_BOTH static constexpr StemTap of(int block, int depth) {
    const int row = 2 - 2 * stem_distance(block) + depth / 24, element = depth % 24 - 1;
    return row > 6 || element < 0 || element > 20 ? StemTap{-1, -1} : StemTap{row, element};
  }
};
// Where element e of filter row r of a channel lies.
FASTRES_BOTH constexpr int stem_weight(int channel, int r, int e) {
  const int block = (r % 2 + 2 - r) / 2 & 3;
  return (block * kStemChannels + channel) * kStemDepth + r % 2 * 24 + e + 1;
}

// --- Shared memory, offsets.
constexpr int kStemSlots = 8, kStemLoaders = 4;  // pairs of rows in flight, warps that bring them
constexpr int kStemBlockBytes = kStemChannels * kSwizzleRow;
constexpr int kStemPairBytes = 2 * kStemRowWords * 4;
constexpr int kStemStageBytes = 8 * kSwizzleRow;  // a warp's pooled pixels (and one that nobody stores)
constexpr int kStemRing = kStemStanding * kStemBlockBytes;
constexpr int kStemStage = kStemRing + kStemSlots * kStemPairBytes;
constexpr int kStemConstants = kStemStage + kStemWarps * kStemStageBytes;
constexpr int kStemBarriers = kStemConstants + kStemChannels * 8;
constexpr int kStemBytes = kStemBarriers + kStemSlots * 16;
static_assert(kStemSlots % kStemLoaders == 0 && kStemPairBytes % 16 == 0 && kStemBlockBytes % 1024 == 0);
static_assert(kStemBytes <= 227 * 1024, "more shared memory than a block of Hopper may have");

// Where x's rows come from: 16-byte pieces of [w, 3], or pixels of any strides, of 16 or 8 bits.
enum class StemSource : int { kPieces, kPixels, kBytes };

Record stem_pool_record(const StemPool& p, Type type, StemSource source);

}  // namespace fastres
