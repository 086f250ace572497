// Index arithmetic of the kernels against brute force: every function returns the number of disagreements.
#include <map>
#include <set>
#include <vector>

#include "conv_latency.h"
#include "emulated_tma.h"
#include "ptx_sm90.cuh"
#include "sm90_conv.h"
#include "stem_pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace fastres;

ConvShape shape_of(const int* v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]};
}

}  // namespace

// Where each product's input element lies: from Window and Tap, and from the definition of a convolution.
EXPORT long check_addresses(const int* numbers) {
  const ConvShape v = shape_of(numbers);
  long wrong = 0, pixel = 0;
  const int group_c = v.c / v.groups;
  for (int n = 0; n < v.n; ++n)
    for (int p = 0; p < v.p; ++p)
      for (int q = 0; q < v.q; ++q, ++pixel) {
        const Window window = window_of(v, static_cast<int>(pixel));
        int depth = 0;
        Tap walked = Tap::of(v, 0);
        for (int r = 0; r < v.r; ++r)
          for (int s = 0; s < v.s; ++s)
            for (int c = 0; c < group_c; ++c, ++depth) {
              const int h = p * v.stride_h - v.pad_h + r * v.dilation_h, w = q * v.stride_w - v.pad_w + s * v.dilation_w;
              const bool inside = h >= 0 && h < v.h && w >= 0 && w < v.w;
              const long want = inside ? ((static_cast<long>(n) * v.h + h) * v.w + w) * v.c + c : -1;
              for (const Tap& tap : {Tap::of(v, depth), walked}) {
                const long got = tap.valid(v, window.row, window.column) ? window.offset * v.c + tap.offset(v) : -1;
                wrong += got != want;
              }
              walked.advance(v, 1);
            }
        for (int beyond = 0; beyond < 9; ++beyond) wrong += Tap::of(v, depth + beyond).valid(v, window.row, window.column);
      }
  return wrong;
}

// Striding through the depth as a thread does, `step` elements at a time.
EXPORT long check_strides(const int* numbers, int step) {
  const ConvShape v = shape_of(numbers);
  long wrong = 0;
  for (int start = 0; start < step; start += 4) {
    Tap walked = Tap::of(v, start);
    for (int depth = start; depth < v.depth() + 2 * step; depth += step) {
      const Tap direct = Tap::of(v, depth);
      wrong += walked.r != direct.r || walked.s != direct.s || walked.c != direct.c;
      walked.advance(v, step);
    }
  }
  return wrong;
}

// Blocks cover every output and every step of depth exactly once.
EXPORT long check_tiles(const int* numbers, int block_m, int block_n, int splits, int step) {
  const ConvShape v = shape_of(numbers);
  const ConvTiles tiles = ConvTiles::of(v, block_m, block_n, splits);
  const int steps = static_cast<int>(ceil_div(v.depth(), step));
  std::vector<int> covered(v.pixels() * v.k, 0);
  std::map<int, std::vector<int>> depth;
  std::map<int, std::set<std::tuple<int, int, int>>> places;
  for (int64_t block = 0; block < tiles.blocks(); ++block) {
    const ConvTile at = ConvTile::of(tiles, static_cast<int>(block));
    const Range range = part_of(steps, at.split, splits);
    auto& seen = depth[at.tile];
    seen.resize(steps);
    for (int i = range.begin; i < range.end; ++i) ++seen[i];
    places[at.tile].insert({at.group, at.first_pixel, at.first_filter});
    if (at.split) continue;
    for (int m = at.first_pixel; m < at.first_pixel + block_m && m < v.pixels(); ++m)
      for (int n = at.first_filter; n < at.first_filter + block_n && n < v.group_k(); ++n)
        ++covered[static_cast<int64_t>(m) * v.k + at.group * v.group_k() + n];
  }
  long wrong = 0;
  for (int count : covered) wrong += count != 1;
  for (auto& [tile, seen] : depth) {
    wrong += tile < 0 || tile >= tiles.tiles() || places[tile].size() != 1;
    for (int count : seen) wrong += count != 1;
  }
  return wrong + (static_cast<int64_t>(depth.size()) != tiles.tiles());
}

// Boxes cover every output once; a box's steps hold every product that is not zero once, and no tap that lies in the
// padding for all of the box; its parts differ by at most one step. `total`: the steps of all boxes of one filter tile.
EXPORT long check_boxes(const int* numbers, const int* box, int filters, int parts, long* total) {
  const ConvShape v = shape_of(numbers);
  const ConvBoxes boxes = ConvBoxes::of(v, box[0], box[1], box[2], filters, parts);
  const int chunks = static_cast<int>(ceil_div(v.group_c(), kLatencyDepth));
  std::vector<int> covered(v.pixels() * v.groups * boxes.filter_tiles.by, 0);
  long wrong = 0;
  *total = 0;
  for (int64_t block = 0; block < boxes.blocks(); ++block) {
    const ConvBox at = ConvBox::of(boxes, static_cast<int>(block));
    const Taps taps = Taps::of(v, boxes, at);
    const Range range = boxes.part(taps.steps(), at.part), first = boxes.part(taps.steps(), 0);
    wrong += std::abs(range.end - range.begin - first.end + first.begin) > 1;
    if (at.part) continue;
    int end = 0;
    for (int part = 0; part < parts; ++part) {
      const Range next = boxes.part(taps.steps(), part);
      wrong += next.begin != end;
      end = next.end;
    }
    wrong += end != taps.steps();
    std::map<std::tuple<int, int, int>, int> held;
    for (int i = 0; i < taps.steps(); ++i) {
      const Taps::Step step = taps.step(i);
      ++held[{step.r, step.s, step.chunk}];
    }
    if (at.group == 0 && at.first_filter == 0) *total += taps.steps();
    std::set<std::pair<int, int>> needed;
    for (int m = 0; m < 128; ++m) {
      const int64_t pixel = at.pixel(v, boxes, m);
      wrong += m >= boxes.pixels() && pixel >= 0;
      if (pixel < 0) continue;
      ++covered[(pixel * v.groups + at.group) * boxes.filter_tiles.by + at.first_filter / filters];
      const Window window = window_of(v, static_cast<int>(pixel));
      for (int r = 0; r < v.r; ++r)
        for (int s = 0; s < v.s; ++s)
          if (Tap{r, s, 0}.valid(v, window.row, window.column)) needed.insert({r, s});
    }
    for (const auto& [r, s] : needed)
      for (int chunk = 0; chunk < chunks; ++chunk) wrong += held[{r, s, chunk}] != 1;
    // Only where windows step over the image may a tap be held that nobody needs.
    const bool steps_over = v.stride_h > v.h || v.stride_w > v.w;
    for (const auto& [place, count] : held)
      wrong += count != 1 || (!steps_over && !needed.count({std::get<0>(place), std::get<1>(place)}));
  }
  for (int count : covered) wrong += count != 1;
  return wrong;
}

// Quotients and remainders of numbers below 2^31, at multiples of the divisor and beside them.
EXPORT long check_divisor(int by) {
  const Divisor d = Divisor::of(by);
  long wrong = 0;
  for (int64_t base : {int64_t{0}, int64_t{by}, int64_t{1} << 20, int64_t{1} << 27, int64_t{1} << 30, int64_t{0x7fffffff}})
    for (int64_t n = base / by * by - 2; n <= base / by * by + 2; ++n)
      if (n >= 0 && n < int64_t{1} << 31)
        wrong += static_cast<int>(n) / d != n / by || static_cast<int>(n) % d != n % by;
  return wrong;
}

EXPORT int swizzle_64_of(int row, int chunk) { return swizzle_64(row, chunk); }
EXPORT void part_of_steps(int steps, int part, int parts, int* range) {
  const Range r = part_of(steps, part, parts);
  range[0] = r.begin, range[1] = r.end;
}

// sm90_conv_bn_act: outputs are covered once, steps go through the depth once, loads find the elements that the
// definition of a convolution asks for. Loads are looked at in every `every`-th step of every `every`-th tile.
EXPORT long check_sm90_conv(const int* numbers, int second_c, int filters, int pixels, int cluster, int every) {
  ThroughputConv t{};
  const ConvShape v = t.conv.shape = shape_of(numbers);
  t.conv.residual = second_c ? nullptr : &t;  // any pointer: nobody looks there
  if (second_c) {
    t.second = &t;
    t.second_shape = {v.n, v.p * 2 - 1, v.q * 2, second_c, v.p, v.q, v.k, 1, 1, 2, 2, 0, 0, 1, 1, 1};
  }
  const Sm90Conv p = sm90_conv_tiles(t, filters, pixels, cluster, 7);
  const ConvTileShape tile{filters, pixels};
  const bool halo = tile.halo();
  const ConvLayout layout = ConvLayout::of(tile, p.stages, p.slots);
  long wrong = layout.bytes > kSharedBytes || p.stages < 3 || p.slots < 2 || p.ticks < 2 || p.ticks > kMaxTicks ||
               layout.stages % 1024 || layout.slots % 1024 || layout.barriers % 8 || p.clusters > p.tiles || p.clusters * cluster > 7;

  std::vector<ConvStep> steps;
  for (ConvStep at = ConvDepth::of(p, 0).first; static_cast<int>(steps.size()) < p.steps; at.advance(p)) steps.push_back(at);
  size_t step = 0;
  for (int source = 0; source < (second_c ? 2 : 1); ++source) {
    const ConvShape& of = source ? t.second_shape : v;
    const auto expect = [&](int r, int s, int c) {
      if (step >= steps.size()) return;
      const ConvStep& at = steps[step++];
      wrong += at.source != source || at.r != r || at.s != s || at.c != c;
    };
    const int c_steps = (of.c + 63) / 64;
    for (int i = 0; i < (halo ? of.s : of.r); ++i)
      for (int j = 0; j < (halo ? c_steps : of.s); ++j)
        for (int k = 0; k < (halo ? of.r : c_steps); ++k) halo ? expect(k, i, j) : expect(i, j, k);
  }
  wrong += step != steps.size();

  std::vector<unsigned char> covered(v.pixels() * v.k, 0);
  emulator::Block block;
  block.memory.resize(tile.pixels_bytes());
  block.shared = block.memory.data(), block.shared_bytes = tile.pixels_bytes();
  const auto* base = reinterpret_cast<const unsigned char*>(uintptr_t{1} << 20);
  int seen = 0;
  for (int number = 0; number < p.tiles; ++number)
    for (int rank = 0; rank < cluster; ++rank) {
      const auto at = Sm90ConvTile::of(p, number, rank, filters, pixels);
      for (int i = at.first_pixel; i < at.first_pixel + pixels; ++i) {
        int64_t m = i;
        if (halo) {
          const HaloPlace place = HaloPlace::of(p, i);
          const int image = place.n + i % kHaloRow / v.w;
          m = image < v.n && place.h < v.h ? (static_cast<int64_t>(image) * v.h + place.h) * v.w + i % kHaloRow % v.w : -1;
        }
        if (m < 0 || m >= p.pixels) continue;
        for (int n = at.first_filter; n < at.first_filter + filters && n < v.k; ++n)
          ++covered[m * v.k + n];
      }
      if (number % p.tiles_k || seen++ % every) continue;
      for (size_t i = 0; i < steps.size(); i += every) {
        const ConvStep& s = steps[i];
        const ConvShape& of = s.source ? t.second_shape : v;
        const TensorMap map = make_tensor_map(halo ? halo_fields(Type::kBf16, base, of, of.c, pixels / kHaloRow + 2)
                                                   : pixels_fields(Type::kBf16, base, of, pixels));
        ptx::BoxPlace place{{s.c * 64, at.first_pixel}};
        const HaloPlace corner = halo ? HaloPlace::of(p, at.first_pixel) : HaloPlace{};
        if (halo) {
          place = {{s.c * 64, s.s - 1, corner.n, corner.h - 1}};
        } else if (!is_plain(of)) {
          const auto w = WindowStart::of(p, p.source[s.source], at.first_pixel);
          place = {{s.c * 64, w.w, w.h, w.n}, {s.s * of.dilation_w, s.r * of.dilation_h}};
        }
        int element = 0;
        ptx::for_box(&block, 0, &map, place, [&](unsigned char* shared, const unsigned char* global) {
          const int row = element / 64, c = s.c * 64 + element % 64, pixel = at.first_pixel + row;
          int image = pixel / (v.p * v.q), in_image = pixel % (v.p * v.q);
          int h = in_image / v.q * of.stride_h - of.pad_h + s.r * of.dilation_h;
          int w = in_image % v.q * of.stride_w - of.pad_w + s.s * of.dilation_w;
          if (halo) {
            image = corner.n + row % kHaloRow / v.w;
            h = corner.h - 1 + row / kHaloRow, w = row % kHaloRow % v.w + s.s - 1;
          }
          const bool inside = image < of.n && c < of.c && h >= 0 && h < of.h && w >= 0 && w < of.w;
          const long want = inside ? (((static_cast<long>(image) * of.h + h) * of.w + w) * of.c + c) * 2 : -1;
          wrong += (global ? global - base : -1) != want;
          wrong += shared - block.shared != swizzle_128(row, element % 64 / 8) + element % 8 * 2;
          ++element;
        });
        wrong += element * 2 != tile.pixels_bytes();
      }
    }
  for (unsigned char count : covered) wrong += count != 1;
  return wrong;
}

// The position form: outputs are covered once, and a tile goes once through the taps that lie inside the image.
EXPORT long check_positions(const int* numbers, int filters, int pixels, int cluster, long* total) {
  ThroughputConv t{};
  const ConvShape v = t.conv.shape = shape_of(numbers);
  t.by_position = true;
  const Sm90Conv p = sm90_conv_tiles(t, filters, pixels, cluster, 7);
  std::vector<int> covered(v.pixels(), 0);
  long wrong = 0;
  *total = 0;
  for (int tile = 0; tile < p.tiles; tile += p.tiles_k)
    for (int rank = 0; rank < cluster; ++rank) {
      const int first = Sm90ConvTile::of(p, tile, rank, filters, pixels).first_pixel;
      const ConvDepth depth = ConvDepth::of(p, first);
      std::map<std::tuple<int, int, int>, int> held;
      ConvStep step = depth.first;
      for (int i = 0; i < depth.steps; ++i, step.advance(p)) wrong += step.source != 0, ++held[{step.r, step.s, step.c}];
      wrong += step.source != 1;
      *total += depth.steps;
      for (int i = first; i < first + pixels; ++i) {
        const Position at = Position::of(p, i);
        wrong += at.at != Position::of(p, first).at;
        if (at.n >= v.n) continue;
        const int pixel = at.n * v.p * v.q + at.at;
        ++covered[pixel];
        const Window window = window_of(v, pixel);
        const WindowStart start = at.window(p);
        wrong += start.w != window.column || start.h != window.row || start.n != at.n;
        size_t needed = 0;
        for (int r = 0; r < v.r; ++r)
          for (int s = 0; s < v.s; ++s)
            for (int c = 0; c < (v.c + 63) / 64 && Tap{r, s, 0}.valid(v, window.row, window.column); ++c, ++needed)
              wrong += held[{r, s, c}] != 1;
        wrong += needed != held.size();
      }
    }
  for (int count : covered) wrong += count != 1;
  return wrong;
}

EXPORT void evictions_of(const int* numbers, int filters, int pixels, int* out) {
  ThroughputConv t{};
  t.conv.shape = shape_of(numbers);
  const Sm90Conv p = sm90_conv_tiles(t, filters, pixels, 2, 132);
  const Eviction all[] = {p.pixels_eviction, p.filters_eviction, p.out_eviction};
  for (int i = 0; i < 3; ++i) out[i] = static_cast<int>(all[i]);
}

// Slots of the residual, and stages beside them.
EXPORT void ring_of(const int* numbers, int filters, int pixels, int* out) {
  ThroughputConv t{};
  t.conv.shape = shape_of(numbers), t.conv.residual = &t;
  const Sm90Conv p = sm90_conv_tiles(t, filters, pixels, 2, 132);
  out[0] = p.slots, out[1] = p.stages;
}

// --- sm90_stem_pool

// Every step's products, walked as the kernel does: a convolution row that completes holds each of its filter rows
// once, on the right input row, and every pooled row is finished from the three convolution rows that it covers.
EXPORT long check_stem_rows(int h, int rows) {
  StemPool p{};
  p.h = h, p.p = (h + 1) / 2, p.pooled_h = (p.p + 1) / 2, p.rows = rows;
  p.tiles_h = static_cast<int>(ceil_div(p.pooled_h, rows)), p.tiles_w = 2, p.tiles = 2 * p.tiles_h;
  long wrong = 0;
  std::vector<int> finished(p.pooled_h, 0);
  for (int tile = 0; tile < p.tiles; tile += p.tiles_w) {
    const StemTile at = StemTile::of(p, tile);
    const StemPairs pairs = StemPairs::of(at, h);
    wrong += at.n != 0 || at.column != 0 || pairs.count < 1;
    std::multiset<std::pair<int, int>> slot[4];  // (input row, filter row)
    std::set<int> best;
    int loaded = 0;
    for (int step = 0; step < stem_steps(at); ++step) {
      const int pair = stem_pair(at, step);
      if (pairs.has(pair)) {
        ++loaded;
        for (int s = 0; s < 4; ++s)
          for (int depth = 0; depth < kStemDepth; depth += 24) {
            const StemTap tap = StemTap::of((stem_first_block(step) + s) % kStemBlocks, depth + 1);
            const int row = 2 * pair - 1 + depth / 24;
            if (tap.row >= 0 && row >= 0 && row < h) slot[s].insert({row, tap.row});
          }
      }
      const int complete = pair - 2;
      auto& sum = slot[stem_slot(step, -2)];
      if (step >= kStemFirstRow) {
        if (complete >= 0 && complete < p.p) {
          std::multiset<std::pair<int, int>> want;
          for (int r = 0; r < 7; ++r)
            if (const int row = 2 * complete - 3 + r; row >= 0 && row < h) want.insert({row, r});
          wrong += sum != want;
          best.insert(complete);
        }
        if (step % 2) {
          if (step > kStemFirstRow) {
            const int pooled = at.row + (step - kStemFirstRow) / 2 - 1;
            std::set<int> want;
            for (int y = 2 * pooled - 1; y <= 2 * pooled + 1; ++y)
              if (y >= 0 && y < p.p) want.insert(y);
            wrong += pooled >= at.row + at.rows || best != want;
            ++finished[pooled];
          }
          best.clear();
          if (complete >= 0 && complete < p.p) best.insert(complete);
        }
      }
      sum.clear();
    }
    wrong += loaded != pairs.count;
  }
  for (int count : finished) wrong += count != 1;
  return wrong;
}

// Where a lane finds its windows: the right columns, the right elements, no two words of one bank.
EXPORT long check_stem_columns(int tile_column) {
  long wrong = 0;
  const int first = stem_first_element(tile_column * kStemColumns);
  wrong += first % 2 != 0 || first * 2 % 16 != 0;
  for (int warp = 0; warp < kStemWarps; ++warp) {
    std::set<int> columns;
    for (int upper = 0; upper < 2; ++upper) {
      for (int word = 0; word < 12; word += 4) {
        std::map<int, int> banks;
        for (int lane = 0; lane < 32; ++lane) {
          const int at = stem_word(warp, stem_column(lane / 4, upper)) + word + lane % 4;
          const auto [bank, fresh] = banks.insert({at % 32, at});
          wrong += !fresh && bank->second != at;
        }
      }
      for (int group = 0; group < 8; ++group) {
        const int c = stem_column(group, upper);
        columns.insert(c);
        // What a lane keeps, and what its partner gives it.
        wrong += (group < 4) != (upper == 1) && c != 2 * group;
        wrong += (group < 4) == (upper == 1) && c != 2 * (group ^ 4) + 1;
        const int x = 2 * (tile_column * kStemColumns + warp * kStemWarpColumns) - 1 + c;
        for (int depth = 0; depth < 24; ++depth) {
          const int element = first + 2 * stem_word(warp, c) + depth;
          const StemTap tap = StemTap::of(0, depth);
          if (tap.element >= 0) wrong += element != 3 * (2 * x - 3) + tap.element;
        }
      }
    }
    wrong += columns.size() != 16 || *columns.begin() != 0 || *columns.rbegin() != 15;
  }
  for (int channel : {0, 1, 63})
    for (int block = 0; block < kStemBlocks; ++block)
      for (int depth = 0; depth < kStemDepth; ++depth)
        if (const StemTap tap = StemTap::of(block, depth); tap.row >= 0)
          wrong += stem_weight(channel, tap.row, tap.element) != (block * kStemChannels + channel) * kStemDepth + depth;
  return wrong;
}
