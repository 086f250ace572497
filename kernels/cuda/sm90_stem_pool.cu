// A ResNet's stem in one persistent kernel for Hopper: 7x7/2 convolution (3 -> 64), scale and shift, ReLU, 3x3/2 max
// pool. bf16 or fp16, NHWC or NCHW, or uint8 images normalised on the way in; NHWC out.
//
// One warp group brings pairs of input rows, [w, 3] in 16 bits whatever they were, into a ring in shared memory; zeros
// stand for the padding. A pair meets four convolution rows: its windows of 2 x 24 elements (two filter rows of 21)
// times the weights of all four are one product 64 x 48 x 256 in each of two warp groups. A goes by single words from
// the ring into registers, so that windows may overlap as they like. After a step one row is complete: it joins the
// running maximum, as fp32 sums, because |scale| > 0 keeps their order (signs are in the weights). Every second step
// the maxima over three rows are finished, and those over three columns taken between lanes.
//
// A zero weight that meets NaN or infinity makes a NaN that the convolution does not have. It shows, as NaN passes
// through every maximum: what comes out as NaN is computed once more from the image, tap by tap.
#include "activation.cuh"
#include "ptx_sm90.cuh"
#include "stem_pool.h"
#include "types.cuh"
#include "wgmma_wide.cuh"

namespace fastres {
namespace {

constexpr int kThreads = 128 + 32 * kStemWarps;
constexpr int kLoaderRegisters = 88, kGroupRegisters = 208;
static_assert(128 * kLoaderRegisters + 32 * kStemWarps * kGroupRegisters <= start_registers(kThreads) * kThreads);
static_assert(kStemLoaders * 32 == 128, "setmaxnreg is for whole groups of four warps");

struct Turn {
  uint32_t full, empty;
  int slot;
  uint32_t parity;
  FASTRES_DEVICE Turn(uint32_t base, unsigned n) : slot(n % kStemSlots), parity(n / kStemSlots & 1) {
    full = base + kStemBarriers + slot * 16;
    empty = full + 8;
  }
};

// --- loading

template <class T>
FASTRES_DEVICE uint32_t pack_bits(T low, T high) {
  union {
    T v[2];
    uint32_t bits;
  } pair;
  pair.v[0] = low, pair.v[1] = high;
  return pair.bits;
}

// Two rows of [w, 3] in pieces of 16 bytes.
template <class T>
FASTRES_DEVICE void load_pieces(const StemPool& p, const StemTile& at, int pair, unsigned char* to) {
  constexpr int kPieces = kStemRowWords / 4, kTurns = (kPieces + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, first = stem_first_element(at.column);
  uint4 v[2][kTurns];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int h = 2 * pair - 1 + r;
    const T* row = static_cast<const T*>(p.x) + at.n * p.stride_n + h * p.stride_h;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int piece = lane + 32 * i, element = first + 8 * piece;
      v[r][i] = uint4{0, 0, 0, 0};
      if (piece < kPieces && h >= 0 && h < p.h && element >= 0 && element < 3 * p.w)
        v[r][i] = *reinterpret_cast<const uint4*>(row + element);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int i = 0; i < kTurns; ++i)
      if (lane + 32 * i < kPieces)
        *reinterpret_cast<uint4*>(to + r * kStemRowWords * 4 + (lane + 32 * i) * 16) = v[r][i];
}

// The same from pixels of any strides, two of a row at a time, which are three words. In: T, or uint8_t to normalise.
// kPaired: planes of even width, the two pixels of a plane load as one.
template <class T, class In, bool kPaired>
FASTRES_DEVICE void load_pixels(const StemPool& p, const StemTile& at, int pair, unsigned char* to) {
  constexpr int kItems = (kStemRowWords + 4) / 3, kTurns = 4;  // four times two pixels of a lane in flight
  static_assert(kItems <= 32 * kTurns);
  const In* image = static_cast<const In*>(p.x) + at.n * p.stride_n;
  float factor[3], offset[3];
  if constexpr (sizeof(In) == 1)
    for (int c = 0; c < 3; ++c) factor[c] = p.normalize[2 * c], offset[c] = p.normalize[2 * c + 1];
#pragma unroll 1
  for (int row = 0; row < 2; ++row) {
    const int lane = static_cast<int>(threadIdx.x) % 32, h = 2 * pair - 1 + row;
    const bool inside = h >= 0 && h < p.h;
    // The row in shared memory starts with the third channel of this column.
    const int left = 4 * at.column - 6;
    Pack<In, 2> v[kTurns][3];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int w = left + 2 * (lane + 32 * i);
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        const In* from = image + (h * p.stride_h + w * p.stride_w + c * p.stride_c);
        v[i][c] = Pack<In, 2>{};
        if (kPaired) {
          if (inside && w >= 0 && w < p.w) v[i][c] = load<In, 2>(from);
        } else {
          if (inside && w >= 0 && w < p.w) v[i][c].v[0] = from[0];
          if (inside && w >= -1 && w + 1 < p.w) v[i][c].v[1] = from[p.stride_w];
        }
      }
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(to) + row * kStemRowWords;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int item = lane + 32 * i, w = left + 2 * item;
      T e[6];
#pragma unroll
      for (int j = 0; j < 6; ++j) {
        if constexpr (sizeof(In) == 1) {
          const float x = static_cast<float>(v[i][j % 3].v[j / 3]) * factor[j % 3] + offset[j % 3];
          e[j] = narrow<T>(inside && w + j / 3 >= 0 && w + j / 3 < p.w ? x : 0.f);
        } else {
          e[j] = v[i][j % 3].v[j / 3];
        }
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const int word = 3 * item - 1 + k;
        if (item < kItems && word >= 0 && word < kStemRowWords) words[word] = pack_bits(e[2 * k], e[2 * k + 1]);
      }
    }
  }
}

template <class T, class In>
FASTRES_DEVICE void load_pixels(const StemPool& p, const StemTile& at, int pair, unsigned char* to) {
  if (p.paired) {
    load_pixels<T, In, true>(p, at, pair, to);
  } else {
    load_pixels<T, In, false>(p, at, pair, to);
  }
}

// Loader warps take the pairs of rows in turn.
template <class T, StemSource kSource>
FASTRES_DEVICE void load_rows(const StemPool& p, unsigned char* memory, uint32_t base) {
  const int warp = ptx::warp_index(), lane = static_cast<int>(threadIdx.x) % 32;
  unsigned n = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < p.tiles; tile += static_cast<int>(gridDim.x)) {
    const StemTile at = StemTile::of(p, tile);
    const StemPairs pairs = StemPairs::of(at, p.h);
    for (int k = static_cast<int>((warp - n) % kStemLoaders); k < pairs.count; k += kStemLoaders) {
      const Turn turn(base, n + k);
      unsigned char* to = memory + kStemRing + turn.slot * kStemPairBytes;
      ptx::barrier_wait(turn.empty, turn.parity ^ 1);
      if constexpr (kSource == StemSource::kPieces) load_pieces<T>(p, at, pairs.first + k, to);
      if constexpr (kSource == StemSource::kPixels) load_pixels<T, T>(p, at, pairs.first + k, to);
      if constexpr (kSource == StemSource::kBytes) load_pixels<T, uint8_t>(p, at, pairs.first + k, to);
      ptx::sync_warp();
      if (lane == 0) ptx::barrier_arrive(turn.full);
    }
    n += pairs.count;
  }
}

// --- computing

// This thread's part of a pair's windows. a[i][0], a[i][1]: words 8 i + t of rows g and g + 8; a[i][2], a[i][3]: 4 on.
FASTRES_DEVICE void load_windows(uint32_t (&a)[3][4], const uint32_t* lower, const uint32_t* upper) {
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    const int word = i < 3 ? 4 * i : kStemRowWords + 4 * (i - 3);
    a[i / 2][i % 2 * 2] = lower[word];
    a[i / 2][i % 2 * 2 + 1] = upper[word];
  }
}
template <class T>
FASTRES_DEVICE void multiply(float (&sum)[128], const uint32_t (&a)[3][4], uint64_t weights, bool accumulate) {
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 3; ++i) ptx::wgmma(sum, a[i], weights + i * kDescriptorStep, accumulate || i > 0, T{});
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(sum);
}

// An element of x in the compute type.
template <class T, StemSource kSource>
FASTRES_DEVICE float element(const StemPool& p, int n, int c, int h, int w) {
  const int64_t at = n * p.stride_n + (c * p.stride_c + h * p.stride_h + w * p.stride_w);
  if constexpr (kSource == StemSource::kBytes) {
    const float x = static_cast<float>(static_cast<const uint8_t*>(p.x)[at]);
    return widen(narrow<T>(x * p.normalize[2 * c] + p.normalize[2 * c + 1]));
  } else {
    return widen(static_cast<const T*>(p.x)[at]);
  }
}

// One output, straight from the definition.
template <class T, StemSource kSource>
FASTRES_DEVICE float pooled(const StemPool& p, int n, int row, int column, int channel) {
  float best = -INFINITY;
#pragma unroll 1
  for (int i = 0; i < 9; ++i) {
    const int y = 2 * row - 1 + i / 3, x = 2 * column - 1 + i % 3;
    if (y < 0 || y >= p.p || x < 0 || x >= p.q) continue;
    float sum = 0;
#pragma unroll 1
    for (int tap = 0; tap < 147; ++tap) {
      const int r = tap / 21, e = tap % 21, h = 2 * y - 3 + r, w = 2 * x - 3 + e / 3;
      if (h >= 0 && h < p.h && w >= 0 && w < p.w)
        sum += widen(static_cast<const T*>(p.weight)[stem_weight(channel, r, e)]) *
               element<T, kSource>(p, n, e % 3, h, w);
    }
    best = ptx::max_nan(best, sum);
    if (best != best) break;
  }
  return best * p.constants[2 * channel] + p.constants[2 * channel + 1];
}

// Whether one of eight numbers is NaN.
template <class T>
FASTRES_DEVICE bool has_nan(const uint4& v) {
  // The maximum of a number and its negative is NaN if the number is: magnitudes, whose maximum compares as integers.
  constexpr uint32_t kMagnitude = 0x7fff7fffu;
  const uint32_t most = ptx::max_nan(ptx::max_nan(v.x & kMagnitude, v.y & kMagnitude, T{}),
                                     ptx::max_nan(v.z & kMagnitude, v.w & kMagnitude, T{}), T{});
  const uint32_t infinity = std::is_same_v<T, bf16> ? 0x7f80u : 0x7c00u;
  return (most & 0x7fff) > infinity || (most >> 16 & 0x7fff) > infinity;
}

// A pooled row of this warp: best is the maximum over three convolution rows of columns stem_column(g, false) ([4 i],
// [4 i + 1]) and stem_column(g, true) ([4 i + 2], [4 i + 3]), channels 8 i + 2 t and the next.
template <class T, StemSource kSource>
FASTRES_DEVICE void finish_row(const StemPool& p, unsigned char* memory, const float (&best)[32], int n, int row,
                               int column) {
  const int warp = ptx::warp_index() - 4, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  unsigned char* stage = memory + kStemStage + warp * kStemStageBytes;
  const int left = 2 * (column + g) - 1;  // the convolution column that this lane keeps
  const bool exists = left >= 0 && left < p.q;
  ptx::sync_warp();  // the row before has been read
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float4 v = reinterpret_cast<const float4*>(memory + kStemConstants)[4 * i + t];
    const uint32_t lower = ptx::pack_relu(best[4 * i] * v.x + v.y, best[4 * i + 1] * v.z + v.w, T{});
    const uint32_t upper = ptx::pack_relu(best[4 * i + 2] * v.x + v.y, best[4 * i + 3] * v.z + v.w, T{});
    uint32_t kept = g < 4 ? lower : upper;
    if (!exists) kept = 0;  // after ReLU that is the pool's padding
    const uint32_t middle = ptx::shuffle(static_cast<int>(g < 4 ? upper : lower), lane ^ 16);
    const uint32_t right = ptx::shuffle(static_cast<int>(kept), (lane + 4) % 32);
    *reinterpret_cast<uint32_t*>(stage + swizzle_128(g, i) + 4 * t) =
        ptx::max_nan(ptx::max_nan(kept, middle, T{}), right, T{});
  }
  ptx::sync_warp();
  const int64_t first = (static_cast<int64_t>(n) * p.pooled_h + row) * p.pooled_w + column;
  T* out = static_cast<T*>(p.out) + first * kStemChannels;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int item = lane + 32 * i, pixel = item / 8, chunk = item % 8;
    if (pixel >= kStemWarpColumns || column + pixel >= p.pooled_w) continue;
    uint4* made = reinterpret_cast<uint4*>(stage + swizzle_128(pixel, chunk));
    if (has_nan<T>(*made)) {
#pragma unroll 1
      for (int j = 0; j < 8; ++j) {
        const float y = pooled<T, kSource>(p, n, row, column + pixel, 8 * chunk + j);
        reinterpret_cast<T*>(made)[j] = narrow<T>(relu(y));
      }
    }
    *reinterpret_cast<uint4*>(out + item * 8) = *made;
  }
}

template <class T, StemSource kSource>
FASTRES_DEVICE void compute(const StemPool& p, unsigned char* memory, uint32_t base) {
  const int warp = ptx::warp_index() - 4, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t* ring = reinterpret_cast<const uint32_t*>(memory + kStemRing);
  int lower = stem_word(warp, stem_column(lane / 4, false)) + lane % 4;
  int upper = stem_word(warp, stem_column(lane / 4, true)) + lane % 4;
  // Two things that ptxas shall not see through: it would compute the places anew each step (15 instructions), and make
  // 32 zeros of 64 moves.
  const float zero = static_cast<float>(p.h >> 31);
  asm volatile("" : "+r"(lower), "+r"(upper));
  float sum[128], best[32];
  unsigned n = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < p.tiles; tile += static_cast<int>(gridDim.x)) {
    const StemTile at = StemTile::of(p, tile);
    const StemPairs pairs = StemPairs::of(at, p.h);
    const int steps = stem_steps(at), column = at.column + warp * kStemWarpColumns;
    bool fresh = true;  // the sums hold the tile before
#pragma unroll 1
    for (int four = 0; four < steps; four += 4) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int step = four + u, pair = stem_pair(at, step);
        if (pairs.has(pair)) {
          const Turn turn(base, n++);
          const uint32_t* rows = ring + turn.slot * (kStemPairBytes / 4);
          uint32_t a[3][4];
          ptx::barrier_wait(turn.full, turn.parity);
          load_windows(a, rows + lower, rows + upper);
          // The convolution row that begins here takes the place of the last one that was complete.
#pragma unroll
          for (int i = 0; i < 32; ++i) sum[32 * stem_slot(u, 1) + i] = zero;
          multiply<T>(sum, a, matrix_descriptor(base + stem_first_block(u) * kStemBlockBytes), !fresh);
          fresh = false;
          ptx::sync_warp();
          if (lane == 0) ptx::barrier_arrive(turn.empty);
        }
        const float* row = sum + 32 * stem_slot(u, -2);
        if (u % 2) {
          // An odd convolution row: the last of one pooled row and the first of the next.
          if (step >= kStemFirstRow && step < steps) {
            const bool exists = pair >= 2 && pair - 2 < p.p;
            if (step > kStemFirstRow) {
#pragma unroll
              for (int i = 0; i < 32; ++i)
                if (exists) best[i] = ptx::max_nan(best[i], row[i]);
              finish_row<T, kSource>(p, memory, best, at.n, at.row + (step - kStemFirstRow) / 2 - 1, column);
            }
#pragma unroll
            for (int i = 0; i < 32; ++i) best[i] = exists ? row[i] : -INFINITY;
          }
        } else if (step > kStemFirstRow) {
#pragma unroll
          for (int i = 0; i < 32; ++i) best[i] = ptx::max_nan(best[i], row[i]);
        }
      }
    }
  }
}

// Weights [kStemBlocks, 64, 48] to rows of 128 bytes, swizzled, the first blocks twice.
template <class T>
FASTRES_DEVICE void load_constants(const StemPool& p, unsigned char* memory) {
  constexpr int kChunks = kStemDepth / 8, kAll = kStemBlocks * kStemChannels * kChunks;
  for (int i = static_cast<int>(threadIdx.x); i < kAll; i += kThreads) {
    const uint4 v = reinterpret_cast<const uint4*>(p.weight)[i];
    const int row = i / kChunks;
    unsigned char* to = memory + row * kSwizzleRow - row % 8 * kSwizzleRow + swizzle_128(row % 8, i % kChunks);
    *reinterpret_cast<uint4*>(to) = v;
    if (row < (kStemStanding - kStemBlocks) * kStemChannels)
      *reinterpret_cast<uint4*>(to + kStemBlocks * kStemBlockBytes) = v;
  }
  if (threadIdx.x < 2 * kStemChannels)
    reinterpret_cast<float*>(memory + kStemConstants)[threadIdx.x] = p.constants[threadIdx.x];
}

template <class T, StemSource kSource>
__global__ void __launch_bounds__(kThreads, 1) sm90_stem_pool_kernel(const __grid_constant__ StemPool p) {
  ptx::let_successor_start();
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(memory);
  if (threadIdx.x == 0) {
    for (unsigned i = 0; i < kStemSlots; ++i) {
      const Turn turn(base, i);
      ptx::barrier_init(turn.full, 1);
      ptx::barrier_init(turn.empty, kStemWarps);
    }
    ptx::fence_barrier_init();
  }
  // These were written long ago: they come while the kernel before this one is still at work.
  load_constants<T>(p, memory);
  ptx::fence_async_shared();
  ptx::sync_threads();
  ptx::wait_for_predecessor();
  if (threadIdx.x < 128) {
    ptx::give_registers<kLoaderRegisters>();
    load_rows<T, kSource>(p, memory, base);
  } else {
    ptx::take_registers<kGroupRegisters>();
    compute<T, kSource>(p, memory, base);
  }
}

template <class T>
Record typed(const StemPool& p, StemSource source) {
  const int blocks = multiprocessors();  // persistent, one an SM
  const Shape shape{dim3(static_cast<unsigned>(blocks < p.tiles ? blocks : p.tiles)), kThreads, kStemBytes};
  const auto kernel = source == StemSource::kPieces   ? sm90_stem_pool_kernel<T, StemSource::kPieces>
                      : source == StemSource::kPixels ? sm90_stem_pool_kernel<T, StemSource::kPixels>
                                                      : sm90_stem_pool_kernel<T, StemSource::kBytes>;
  return make_record(kernel, shape, p, "sm90_stem_pool");
}

}  // namespace

Record stem_pool_record(const StemPool& p, Type type, StemSource source) {
  switch (type) {
    case Type::kBf16: return typed<bf16>(p, source);
    case Type::kFp16: return typed<fp16>(p, source);
    default: throw std::invalid_argument("bfloat16 and float16 are taken");
  }
}

}  // namespace fastres
