// Convolution + BN + residual + activation for small batches on Hopper: everything for the shortest chain of steps.
//
// Filters are wgmma's M (64, of each of one or two groups of warps), pixels its N (32, 64 or 128), so that 49 or 196
// pixels still make full products; larger tiles read less from the L2, smaller ones fill more SMs. The depth is
// divided among the blocks of a cluster, and each block adds the parts of its share of the pixels, in order, through
// distributed shared memory. A block asks for no more shared memory than its steps fill, at most half an SM's: then the
// next layer's blocks find room beside this one's, and their filters are on their way before this layer has ended.
// x [N, H, W, C], weights as LatencyConv says, bf16 or fp16. The dual form adds a projection shortcut: its channels are
// more depth.
#include <algorithm>

#include "conv_latency.h"
#include "epilogue.cuh"
#include "wgmma.cuh"

namespace fastres {
namespace {

constexpr int kMaxStride = 8;              // that TMA steps by

constexpr int threads_of(int filters) { return 2 * filters; }
constexpr int stage_bytes(int filters, int pixels) { return (filters + pixels) * kSwizzleRow; }
// What two blocks an SM leave to each (227 KB, less 1 KB that the system takes of a block).
constexpr int stages_of(int filters, int pixels) { return (113 * 1024 - 128) / stage_bytes(filters, pixels); }
// Floats from a pixel's sums to the next one's; the 4 put eight filters and four pixels into different banks.
constexpr int tile_stride(int filters) { return filters + 4; }
constexpr int tile_bytes(int filters, int pixels) { return pixels * tile_stride(filters) * 4; }

struct Parameters {
  TensorMap weight, x, second;
  ConvShape shape;
  ConvBoxes boxes;
  Epilogue epilogue;
  int second_chunks, second_stride_h, second_stride_w;
  int barriers;  // offset in shared memory
};

// kGeneral: any activation; else identity or ReLU, whose code is small enough for an instruction cache that the next
// layer's kernel shares.
template <class T, int kFilters, int kPixels, bool kGeneral>
__global__ void __launch_bounds__(threads_of(kFilters), 2) sm90_conv_latency_kernel(const __grid_constant__ Parameters p) {
  constexpr int V = 8, kStages = stages_of(kFilters, kPixels), kStageBytes = stage_bytes(kFilters, kPixels);
  constexpr int kThreads = threads_of(kFilters), kFilterBytes = kFilters * kSwizzleRow;
  constexpr int kTileStride = tile_stride(kFilters);
  constexpr int kItems = kPixels * (kFilters / V) / kThreads;  // 16-byte stores of a thread, where no cluster shares them
  constexpr int kAhead = kPixels == 128 || kGeneral ? 1 : kItems;  // whose residual is asked for before the products
  ptx::let_successor_start();
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t ring = ptx::shared_address(memory);  // stage: filters, then pixels
  const uint32_t full = ring + p.barriers;
  const ConvShape& shape = p.shape;
  const ConvBox at = ConvBox::of(p.boxes, static_cast<int>(blockIdx.x));
  const Taps taps = Taps::of(shape, p.boxes, at);
  const int first_steps = taps.steps(), parts = static_cast<int>(p.boxes.parts.by);
  // The taps that remain are shared equally.
  const Range steps = p.boxes.part(first_steps + p.second_chunks, at.part);
  const int count = steps.end - steps.begin, in_flight = count < kStages ? count : kStages;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = ptx::warp_index();

  const int filter_row = at.group * shape.group_k() + at.first_filter;
  const int chunks = static_cast<int>(taps.chunks.by);
  const auto tap_of = [&](int step) {
    const int i = steps.begin + step;
    return i < first_steps ? taps.step(i) : Taps::Step{shape.r, 0, i - first_steps};  // shape.r: of the second
  };
  const auto load_filters = [&](int step, const Taps::Step& tap) {
    const uint32_t stage = ring + step % kStages * kStageBytes, barrier = full + step % kStages * 8;
    ptx::barrier_arrive_expect(barrier, kFilterBytes + p.boxes.pixels() * kSwizzleRow);
    ptx::load_box(stage, &p.weight, barrier, ((tap.r * shape.s + tap.s) * chunks + tap.chunk) * kLatencyDepth, filter_row);
  };
  struct Corner {
    int w, h;
  };
  const auto corner_of = [&](const Taps::Step& tap) {
    if (tap.r == shape.r) return Corner{at.q * p.second_stride_w, at.p * p.second_stride_h};
    return Corner{at.q * shape.stride_w - shape.pad_w + tap.s * shape.dilation_w,
                  at.p * shape.stride_h - shape.pad_h + tap.r * shape.dilation_h};
  };
  const auto load_pixels = [&](int step, const Taps::Step& tap, const Corner& corner) {
    const uint32_t to = ring + step % kStages * kStageBytes + kFilterBytes, barrier = full + step % kStages * 8;
    const bool second = tap.r == shape.r;
    ptx::load_box(to, second ? &p.second : &p.x, barrier, tap.chunk * kLatencyDepth, second ? 0 : at.group, corner.w,
                  corner.h, at.n);
  };

  if (thread == 0) {
    ptx::prefetch_map(&p.weight);
    ptx::prefetch_map(&p.x);
    if (p.second_chunks) ptx::prefetch_map(&p.second);
    for (int i = 0; i < in_flight; ++i) ptx::barrier_init(full + i * 8, 1);
    ptx::fence_barrier_init();
  }
  ptx::sync_threads();
  // A lane a step: they find their places side by side.
  Taps::Step tap{};
  Corner corner{};
  if (thread < in_flight) {
    tap = tap_of(thread);
    corner = corner_of(tap);
    load_filters(thread, tap);
  }

  // A thread's eight filters are the same for all of its pixels.
  const Epilogue& e = p.epilogue;
  const int filter = thread % (kFilters / V) * V, filters = shape.group_k() - at.first_filter - filter;
  const int channel = filter_row + filter;
  const bool aligned = shape.group_k() % V == 0 && filters >= V;
  float scale[V], shift[V];
  if (aligned) {
#pragma unroll
    for (int j = 0; j < V; ++j) scale[j] = e.scale[channel + j], shift[j] = e.shift[channel + j];
  }

  // Where this thread's outputs lie, and the residual: tensors have fewer than 2^31 elements.
  const Range mine = p.boxes.part(kPixels, at.part);
  const auto item_pixel = [&](int k) { return mine.begin + k * (kThreads * V / kFilters) + thread / (kFilters / V); };
  const auto place_of = [&](int k) {
    const int m = item_pixel(k);
    const int pixel = m < mine.end && filters > 0 ? at.pixel(shape, p.boxes, m) : -1;
    return pixel < 0 ? pixel : pixel * shape.k + channel;
  };
  const auto residual_at = [&](int place) {
    Pack<T, V> r;
    if (place >= 0 && aligned && e.residual) r = load<T, V>(static_cast<const T*>(e.residual) + place);
    return r;
  };
  int place[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) place[k] = place_of(k);
  // All of it before the wait, where the layer in front is still at work; the compiler would move it behind.
  asm volatile("" : "+r"(corner.w), "+r"(corner.h), "+r"(tap.chunk));
#pragma unroll
  for (int k = 0; k < kAhead; ++k) asm volatile("" : "+r"(place[k]));

  ptx::wait_for_predecessor();
  if (thread < in_flight) load_pixels(thread, tap, corner);
  // While they come: the residual.
  Pack<T, V> residual[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) residual[k] = residual_at(place[k]);

  float sum[kPixels / 2];
#pragma unroll
  for (float& v : sum) v = 0;
  for (int step = 0; step < count; ++step) {
    ptx::barrier_wait(full + step % kStages * 8, step / kStages & 1);
    ptx::sync_warp();
    const uint32_t stage = ring + step % kStages * kStageBytes;
    const uint64_t a = matrix_descriptor(stage + warp / 4 * 64 * kSwizzleRow), b = matrix_descriptor(stage + kFilterBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kLatencyDepth / 16; ++k)
      ptx::wgmma(sum, a + k * kDescriptorStep, b + k * kDescriptorStep, step > 0 || k > 0, T{});
    ptx::wgmma_commit();
    // The stage of the step before is free when all warps' products of it are done.
    if (step > 0 && step - 1 + kStages < count) {
      ptx::wgmma_wait<1>(sum);
      ptx::sync_threads();
      if (warp == 0 && ptx::elect_one()) {
        const Taps::Step next = tap_of(step - 1 + kStages);
        load_filters(step - 1 + kStages, next);
        load_pixels(step - 1 + kStages, next, corner_of(next));
      }
    }
  }
  ptx::wgmma_wait<0>(sum);
  ptx::sync_threads();

  // [pixel][filter], in the ring's place, where the cluster can read it.
  float* tile = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < kPixels / 2; ++i)
    tile[(i / 4 * 8 + lane % 4 * 2 + i % 2) * kTileStride + warp * 16 + i / 2 % 2 * 8 + lane / 4] = sum[i];
  if (parts > 1) {
    ptx::sync_cluster_shared();
  } else {
    ptx::sync_threads();
  }

  const auto add_parts = [&](int k, float (&total)[V]) {
    const int at_tile = item_pixel(k) * kTileStride + filter;
#pragma unroll
    for (float& v : total) v = 0;
    // Parts in order, several on their way at once.
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int j = 0; j < V; j += 4) {
        const float4 four = parts == 1 ? *reinterpret_cast<const float4*>(tile + at_tile + j)
                                       : ptx::load_cluster(ptx::address_in(ring, part) + (at_tile + j) * 4);
        total[j] += four.x, total[j + 1] += four.y, total[j + 2] += four.z, total[j + 3] += four.w;
      }
    }
  };
  if (!aligned) {
#pragma unroll 1
    for (int k = 0; k < kItems; ++k) {
      const int to = place_of(k);
      if (to < 0) continue;
      float total[V];
      add_parts(k, total);
      finish<T, V>(e, total, to, channel, filters, false);
    }
  } else {
#pragma unroll (kGeneral ? 1 : kItems)
    for (int k = 0; k < kItems; ++k) {
      const int to = k < kAhead ? place[k % kAhead] : place_of(k);
      if (to < 0) continue;
      const Pack<T, V> added = k < kAhead ? residual[k % kAhead] : residual_at(to);
      float total[V];
      add_parts(k, total);
      Pack<T, V> y;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float z = total[j] * scale[j] + shift[j];
        if (e.residual) z += widen(added.v[j]);
        if constexpr (kGeneral) {
          z = activate(e.act, z, e.act_param);
        } else if (e.act == kRelu) {
          z = relu(z);
        }
        y.v[j] = narrow<T>(z);
      }
      store<T, V>(static_cast<T*>(e.out) + to, y);
    }
  }
  // Nobody leaves while another block may still read its sums.
  if (parts > 1) {
    ptx::sync_warp();  // whose lanes may have left the loop apart
    ptx::arrive_cluster_relaxed();
    ptx::wait_cluster();
  }
}

// The input pixels of a box of outputs at one tap: [channels of a group, groups, w, h, n].
TensorMap pixels_map(Type type, const void* base, const ConvShape& v, const ConvBoxes& b) {
  TensorMapFields f{type, 5, base};
  const uint64_t size[] = {static_cast<uint64_t>(v.group_c()), static_cast<uint64_t>(v.groups),
                           static_cast<uint64_t>(v.w), static_cast<uint64_t>(v.h), static_cast<uint64_t>(v.n)};
  const uint64_t row = uint64_t{2} * v.c;
  const uint64_t stride[] = {uint64_t{2} * v.group_c(), row, row * v.w, row * v.w * v.h};
  const uint32_t box[] = {kLatencyDepth, 1, b.columns.by, b.rows.by, static_cast<uint32_t>(b.images)};
  std::copy_n(size, 5, f.size), std::copy_n(stride, 4, f.stride), std::copy_n(box, 5, f.box);
  f.step[2] = static_cast<uint8_t>(v.stride_w), f.step[3] = static_cast<uint8_t>(v.stride_h);
  return make_tensor_map(f);
}

template <class T, int kFilters, bool kGeneral>
Record typed(const Parameters& p, int pixels, unsigned shared, const char* name) {
  const Shape shape{dim3(static_cast<unsigned>(p.boxes.blocks())), threads_of(kFilters), shared, p.boxes.parts.by};
  auto* kernel = sm90_conv_latency_kernel<T, kFilters, 32, kGeneral>;
  if (pixels == 64) kernel = sm90_conv_latency_kernel<T, kFilters, 64, kGeneral>;
  if (pixels == 128) kernel = sm90_conv_latency_kernel<T, kFilters, 128, kGeneral>;
  return make_record(kernel, shape, p, name);
}
template <class T>
Record typed(const Parameters& p, int pixels, unsigned shared, const char* name) {
  if (p.epilogue.act > kRelu)
    return p.boxes.filters == 64 ? typed<T, 64, true>(p, pixels, shared, name) : typed<T, 128, true>(p, pixels, shared, name);
  return p.boxes.filters == 64 ? typed<T, 64, false>(p, pixels, shared, name) : typed<T, 128, false>(p, pixels, shared, name);
}

}  // namespace

Record sm90_conv_latency_record(const LatencyConv& c, Type type, int images, int rows, int columns, int filters,
                                int cluster) {
  const ConvShape& v = c.conv.shape;
  const auto refuse = [](bool wrong, const char* why) {
    if (wrong) throw std::invalid_argument(why);
  };
  refuse(type != Type::kBf16 && type != Type::kFp16, "bfloat16 and float16 are taken");
  refuse(cluster != 1 && cluster != 2 && cluster != 4 && cluster != 8, "cluster: 1, 2, 4 and 8 blocks are taken");
  refuse(filters != 64 && filters != 128, "filters: 64 and 128 a block are taken");
  refuse(images < 1 || rows < 1 || columns < 1 || static_cast<int64_t>(images) * rows * columns > 128,
         "a box has 1 to 128 pixels");
  refuse(v.group_c() % 8 || (c.second && c.second_shape.c % 8), "a group's channels must be a multiple of 8");
  for (const ConvShape* s : {&v, c.second ? &c.second_shape : &v}) {
    refuse(s->stride_h > kMaxStride || s->stride_w > kMaxStride, "strides up to 8 are taken");
    refuse(rows * s->stride_h > 256 || columns * s->stride_w > 256, "a box spans at most 256 rows and columns of the input");
  }
  Parameters p{};
  p.shape = v;
  p.boxes = ConvBoxes::of(v, images, rows, columns, filters, cluster);
  refuse(p.boxes.blocks() >= int64_t{1} << 31, "more than 2^31 blocks");
  p.epilogue = {c.conv.residual, c.conv.scale, c.conv.shift, c.conv.out, c.conv.act, c.conv.act_param};
  p.x = pixels_map(type, c.conv.x, v, p.boxes);
  int steps = v.r * v.s * static_cast<int>(p.boxes.chunks.by);
  if (c.second) {
    p.second = pixels_map(type, c.second, c.second_shape, p.boxes);
    p.second_chunks = static_cast<int>(ceil_div(c.second_shape.c, kLatencyDepth));
    p.second_stride_h = c.second_shape.stride_h, p.second_stride_w = c.second_shape.stride_w;
    steps += p.second_chunks;
  }
  refuse(steps >= 1 << 27, "2^27 steps of depth or more");
  TensorMapFields weight{type, 2, c.conv.weight};
  weight.size[0] = static_cast<uint64_t>(c.conv.weight_row), weight.size[1] = static_cast<uint64_t>(v.k);
  weight.stride[0] = uint64_t{2} * static_cast<uint64_t>(c.conv.weight_row);
  weight.box[0] = kLatencyDepth, weight.box[1] = static_cast<uint32_t>(filters);
  p.weight = make_tensor_map(weight);

  const int pixels = p.boxes.pixels() <= 32 ? 32 : p.boxes.pixels() <= 64 ? 64 : 128;
  const int stages = std::min<int>(stages_of(filters, pixels), static_cast<int>(ceil_div(steps, cluster)));
  p.barriers = static_cast<int>(round_up(std::max(stages * stage_bytes(filters, pixels), tile_bytes(filters, pixels)), 8));
  const unsigned shared = static_cast<unsigned>(p.barriers + stages * 8);
  const char* name = c.second ? "sm90_conv_latency, dual" : "sm90_conv_latency";
  return type == Type::kBf16 ? typed<bf16>(p, pixels, shared, name) : typed<fp16>(p, pixels, shared, name);
}

}  // namespace fastres
