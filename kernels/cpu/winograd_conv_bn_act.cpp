// act(conv3x3(x, w) + shift[k] + residual), stride 1, fp32, channels_last, by Winograd's F(2x2, 3x3) (Lavin
// and Gray, 2016, "Fast algorithms for convolutional neural networks"): 16 products make the 4 outputs that
// take 36 directly.
//
// A block of tiles goes from its input transform over 16 matrix products to its outputs in memory of the
// thread's own, which up to 128 channels stays in a 1 MB L2 cache. An output depends on its own 3x3 window
// alone, as in direct convolution, and all transforms of whole numbers are exact.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "activation.h"
#include "tensor.h"

namespace fastres {
namespace {

using Ints = torch::headeronly::IntHeaderOnlyArrayRef;
using V = Vec<float>;
constexpr int W = kLanes<float>;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kWide = 4;  // vectors of output channels in a product, of 32 registers
#else
constexpr int kWide = 2;  // of 16
#endif
constexpr int kTall = 6;  // tiles in a product
constexpr int kOut = 2;   // outputs of a tile along an axis
constexpr int kIn = 4;    // its inputs
constexpr int kPoints = kIn * kIn;
constexpr int kPacked = 16;  // output channels are padded to a multiple of this, whatever the vectors are
// Channels summed before they are added to the rest: half of a 32 KB L1 cache holds their weights, and
// shorter sums round less.
constexpr int64_t kDepth = 64;

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

inline void transform_input(const V (&d)[kIn], V (&u)[kIn]) {
  u[0] = d[0] - d[2];
  u[1] = d[1] + d[2];
  u[2] = d[2] - d[1];
  u[3] = d[1] - d[3];
}

inline void transform_output(const V (&m)[kIn], V (&y)[kOut]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

inline void transform_weight(const double (&g)[3], double (&v)[kIn]) {
  v[0] = g[0];
  v[1] = (g[0] + g[1] + g[2]) / 2;
  v[2] = (g[0] - g[1] + g[2]) / 2;
  v[3] = g[2];
}

// Packed weights: blocks of kWide vectors of output channels, then single vectors; in each block a [C,
// channels] matrix for every point.
struct Packing {
  int64_t c, vectors;  // vectors of output channels
  explicit Packing(int64_t c, int64_t k) : c(c), vectors((k + W - 1) / W) {}
  int64_t blocks() const { return vectors / kWide + vectors % kWide; }
  int64_t first(int64_t block) const {
    return block * kWide - std::max<int64_t>(0, block - vectors / kWide) * (kWide - 1);
  }
  int64_t width(int64_t block) const { return block < vectors / kWide ? kWide : 1; }
  int64_t offset(int64_t block) const { return first(block) * W * kPoints * c; }
};

void winograd_pack(const Tensor& weight, const Tensor& packed) {
  FASTRES_CHECK(weight.is_cpu() && packed.is_cpu(), "weight and packed must be CPU tensors");
  FASTRES_CHECK_TYPE(weight.scalar_type() == ScalarType::Double, "weight is ", name_of(weight.scalar_type()),
                     ", expected float64");
  FASTRES_CHECK_TYPE(packed.scalar_type() == ScalarType::Float, "packed is ", name_of(packed.scalar_type()),
                     ", expected float32");
  const auto sizes = weight.sizes();
  FASTRES_CHECK(sizes.size() == 4 && sizes[2] == 3 && sizes[3] == 3,
                "weight must have the shape [K, C, 3, 3], it has ", shape_of(sizes));
  FASTRES_CHECK(is_dense(weight, false), "weight must be contiguous, its strides are ",
                shape_of(weight.strides()));
  const int64_t k = sizes[0], c = sizes[1];
  FASTRES_CHECK(packed.sizes().size() == 1 && packed.numel() == kPoints * c * round_up(k, kPacked) &&
                    (packed.numel() == 0 || packed.strides()[0] == 1),
                "packed must be contiguous of the shape [", kPoints * c * round_up(k, kPacked), "], it has ",
                shape_of(packed.sizes()));
  const double* from = data<double>(weight);
  float* to = mutable_data<float>(packed);
  const Packing packing(c, k);
  std::fill(to + packing.offset(packing.blocks()), to + packed.numel(), 0.0f);
  parallel_for(0, packing.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t channels = packing.width(block) * W;
      float* points = to + packing.offset(block);
      for (int64_t j = 0; j < channels; ++j) {
        const int64_t channel = packing.first(block) * W + j;
        for (int64_t i = 0; i < c; ++i) {
          double rows[kIn][3] = {}, v[kIn][kIn] = {};
          if (channel < k) {
            const double* g = from + (channel * c + i) * 9;
            for (int s = 0; s < 3; ++s) {
              double column[kIn];
              transform_weight({g[s], g[3 + s], g[6 + s]}, column);
              for (int r = 0; r < kIn; ++r) rows[r][s] = column[r];
            }
            for (int r = 0; r < kIn; ++r) transform_weight(rows[r], v[r]);
          }
          for (int p = 0; p < kPoints; ++p)
            points[(p * c + i) * channels + j] = static_cast<float>(v[p / kIn][p % kIn]);
        }
      }
    }
  });
}

struct Shape {
  int64_t n, h, w, c, k, p, q, pad_h, pad_w;
  int64_t tiles_h() const { return (p + kOut - 1) / kOut; }
  int64_t tiles_w() const { return (q + kOut - 1) / kOut; }
  int64_t tiles() const { return n * tiles_h() * tiles_w(); }
};

// Where a tile stands: its image and its first output.
struct Place {
  int64_t n, row, column;
  Place(const Shape& s, int64_t tile)
      : n(tile / (s.tiles_h() * s.tiles_w())),
        row(tile / s.tiles_w() % s.tiles_h() * kOut),
        column(tile % s.tiles_w() * kOut) {}
  void next(const Shape& s) {
    if ((column += kOut) < s.q) return;
    column = 0;
    if ((row += kOut) < s.p) return;
    row = 0;
    ++n;
  }
};

// One thread's memory: transformed inputs and products, [point][tile][channels], and a row of zeros.
class Scratch {
 public:
  Scratch(int64_t tiles, int64_t c)
      // A line more between points: they would lie 4096 bytes apart and share a set of the L1 cache.
      : row(round_up(c, W)),
        point(tiles * row + 64 / sizeof(float)),
        product(tiles * kWide * W + 64 / sizeof(float)) {
    const int64_t floats = round_up(kPoints * (point + product) + row, 16);
    inputs = memory(floats);
    products = inputs + kPoints * point;
    zeros = products + kPoints * product;
    std::fill(zeros, zeros + row, 0.0f);
  }
  int64_t row, point, product;  // strides
  float *inputs, *products, *zeros;

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  // Kept from call to call, for as long as the thread lives: fresh pages cost more than a transform.
  static float* memory(int64_t floats) {
    thread_local std::unique_ptr<float, Free> kept;
    thread_local int64_t size = 0;
    if (size < floats) {
      size = 0;
      kept.reset(static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))));
      if (!kept) throw std::bad_alloc();
      size = floats;
    }
    return kept.get();
  }
};

void transform_inputs(const float* x, const Shape& s, int64_t begin, int64_t end, const Scratch& scratch) {
  Place at(s, begin);
  for (int64_t tile = begin; tile < end; ++tile, at.next(s)) {
    const float* pixels[kIn][kIn];
    const int64_t top = at.row - s.pad_h, left = at.column - s.pad_w;
    const float* corner = x + ((at.n * s.h + top) * s.w + left) * s.c;
    for (int i = 0; i < kIn; ++i)
      for (int j = 0; j < kIn; ++j) {
        const bool inside = top + i >= 0 && top + i < s.h && left + j >= 0 && left + j < s.w;
        pixels[i][j] = inside ? corner + (i * s.w + j) * s.c : scratch.zeros;
      }
    float* to = scratch.inputs + (tile - begin) * scratch.row;
    const auto transform = [&](int64_t c, auto lanes) {
      V rows[kIn][kIn];  // [column of pixels][transformed row]
      for (int j = 0; j < kIn; ++j) {
        const V d[kIn] = {lanes.load(pixels[0][j] + c), lanes.load(pixels[1][j] + c),
                          lanes.load(pixels[2][j] + c), lanes.load(pixels[3][j] + c)};
        transform_input(d, rows[j]);
      }
      for (int i = 0; i < kIn; ++i) {
        V u[kIn];
        const V d[kIn] = {rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
        transform_input(d, u);
        for (int j = 0; j < kIn; ++j) store(to + (i * kIn + j) * scratch.point + c, u[j]);
      }
    };
    int64_t c = 0;
    for (; c + W <= s.c; c += W) transform(c, Full{});
    if (c < s.c) transform(c, Tail{static_cast<int>(s.c - c)});
  }
}

// Compilers would otherwise read it again for every product.
inline V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// out[M, N vectors] (+)= a[M, depth] b[depth, N vectors]
template <int M, int N>
void multiply(const float* a, int64_t stride, const float* b, int64_t depth, float* out, bool add) {
  V sum[M][N] = {};
  for (int64_t i = 0; i < depth; ++i, b += N * W) {
    V right[N];
    for (int n = 0; n < N; ++n) right[n] = in_register(load(b + n * W));
    for (int m = 0; m < M; ++m) {
      const V left = splat(a[m * stride + i]);
      for (int n = 0; n < N; ++n) sum[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float* to = out + (m * N + n) * W;
      store(to, add ? load(to) + sum[m][n] : sum[m][n]);
    }
}

template <int N>
void multiply(int64_t m, const float* a, int64_t stride, const float* b, int64_t depth, float* out,
              bool add) {
  switch (m) {
    case 1: return multiply<1, N>(a, stride, b, depth, out, add);
    case 2: return multiply<2, N>(a, stride, b, depth, out, add);
    case 3: return multiply<3, N>(a, stride, b, depth, out, add);
    case 4: return multiply<4, N>(a, stride, b, depth, out, add);
    case 5: return multiply<5, N>(a, stride, b, depth, out, add);
    default: return multiply<kTall, N>(a, stride, b, depth, out, add);
  }
}

// The products of all points for N vectors of output channels.
template <int N>
void multiply_points(const float* weights, int64_t c, int64_t tiles, const Scratch& scratch) {
  for (int p = 0; p < kPoints; ++p)
    for (int64_t from = 0; from < c; from += kDepth) {
      const int64_t depth = std::min(kDepth, c - from);
      for (int64_t t = 0; t < tiles; t += kTall)
        multiply<N>(std::min<int64_t>(kTall, tiles - t),
                    scratch.inputs + p * scratch.point + t * scratch.row + from, scratch.row,
                    weights + (p * c + from) * N * W, depth,
                    scratch.products + p * scratch.product + t * N * W, from > 0);
    }
}

template <int64_t kAct>
struct Epilogue {
  const float *shift, *residual;
  float* out;
  int64_t act;
  float param;

  // Outputs of the tiles from `begin` on, `width` vectors of channels from `first` on.
  void operator()(const Shape& s, int64_t begin, int64_t end, int64_t first, int64_t width,
                  const Scratch& scratch) const {
    Place at(s, begin);
    for (int64_t tile = begin; tile < end; ++tile, at.next(s)) {
      const int64_t rows = std::min<int64_t>(kOut, s.p - at.row),
                    columns = std::min<int64_t>(kOut, s.q - at.column);
      const int64_t corner = ((at.n * s.p + at.row) * s.q + at.column) * s.k;
      const float* from = scratch.products + (tile - begin) * width * W;
      for (int64_t v = 0; v < width; ++v, from += W) {
        const int64_t channel = (first + v) * W;
        const auto finish = [&](auto lanes) {
          V half[kIn][kOut], y[kOut][kOut];
          for (int j = 0; j < kIn; ++j) {
            V m[kIn];
            for (int i = 0; i < kIn; ++i) m[i] = load(from + (i * kIn + j) * scratch.product);
            transform_output(m, half[j]);
          }
          for (int i = 0; i < kOut; ++i) {
            const V m[kIn] = {half[0][i], half[1][i], half[2][i], half[3][i]};
            transform_output(m, y[i]);
          }
          const V add = lanes.load(shift + channel);
          for (int i = 0; i < kOut; ++i)
            for (int j = 0; j < kOut; ++j) {
              if (i >= rows || j >= columns) continue;
              const int64_t to = corner + (i * s.q + j) * s.k + channel;
              V z = y[i][j] + add;
              if (residual) z += lanes.load(residual + to);
              lanes.store(out + to, activate<kAct, float>(z, act, param));
            }
        };
        if (channel + W <= s.k)
          finish(Full{});
        else
          finish(Tail{static_cast<int>(s.k - channel)});
      }
    }
  }
};

// How the work is cut: blocks of tiles times groups of channel blocks. Results do not depend on it.
struct Cut {
  int64_t tiles, blocks, groups;
  Cut(const Shape& s, const Packing& packing, int64_t threads) {
    // Fewer would read the weights too often; more gain nothing (Zen 4, 64 to 512 channels, 24 to 96 tiles
    // tried).
    constexpr int64_t kMost = 8 * kTall;
    const int64_t all = s.tiles();
    const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    blocks = up(all, kMost);
    groups = 1;
    if (blocks >= threads) {
      blocks = round_up(blocks, threads);
    } else {
      groups = std::min(packing.blocks(), up(threads, blocks));
      blocks = std::clamp(up(threads, groups), blocks, std::max(blocks, up(all, kTall)));
    }
    tiles = up(all, blocks);
    blocks = up(all, tiles);
  }
};

void winograd_conv_bn_act(const Tensor& x, const Tensor& packed, const Tensor& shift,
                          const Optional& residual, int64_t act, double act_param, const Ints& padding,
                          const Tensor& out) {
  const Dense d = dense(x, "x");
  FASTRES_CHECK_TYPE(d.type == ScalarType::Float, "x is ", name_of(d.type), ", expected float32");
  const auto in = x.sizes(), to = out.sizes();
  FASTRES_CHECK(in.size() == 4, "x must have the shape [N, C, H, W], it has ", shape_of(in));
  FASTRES_CHECK(is_dense(x, true), "x must be channels_last, its strides are ", shape_of(x.strides()));
  FASTRES_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0,
                "padding takes two numbers from 0 on, it is ", shape_of(padding));
  FASTRES_CHECK(to.size() == 4, "out must have the shape [N, K, P, Q], it has ", shape_of(to));
  const Shape s{in[0], in[2], in[3], in[1], to[1], to[2], to[3], padding[0], padding[1]};
  FASTRES_CHECK(
      s.p == s.h + 2 * s.pad_h - 2 && s.q == s.w + 2 * s.pad_w - 2 && s.p > 0 && s.q > 0 && to[0] == s.n,
      "out has the shape ", shape_of(to), ", expected [", s.n, ", K, ", s.h + 2 * s.pad_h - 2, ", ",
      s.w + 2 * s.pad_w - 2, "]");
  Dense want{d.type, s.n, s.k, s.p * s.q, true};
  check_like(out, out, want, "out");
  check_like(residual, out, want, "residual");
  check_channels(shift, want, "shift");
  const int64_t floats = kPoints * s.c * round_up(s.k, kPacked);
  FASTRES_CHECK(packed.is_cpu(), "packed must be a CPU tensor");
  FASTRES_CHECK_TYPE(packed.scalar_type() == d.type, "packed is ", name_of(packed.scalar_type()),
                     ", expected float32");
  FASTRES_CHECK(
      packed.sizes().size() == 1 && packed.numel() == floats && (floats == 0 || packed.strides()[0] == 1),
      "packed must be contiguous of the shape [", floats, "], it has ", shape_of(packed.sizes()));
  FASTRES_CHECK(act >= 0 && act < kActivations, "act is ", act, ", it takes 0 to ", kActivations - 1);
  if (out.numel() == 0) return;

  const float *px = data<float>(x), *weights = data<float>(packed);
  const Packing packing(s.c, s.k);
  const Cut cut(s, packing, torch::stable::get_num_threads());
  dispatch_activation(act, [&](auto code) {
    const Epilogue<code()> epilogue{data<float>(shift), static_cast<const float*>(pointer(residual)),
                                    mutable_data<float>(out), act, static_cast<float>(act_param)};
    parallel_for(0, cut.blocks * cut.groups, 1, [&](int64_t first, int64_t last) {
      const Scratch scratch(cut.tiles, s.c);
      int64_t transformed = -1;
      for (int64_t item = first; item < last; ++item) {
        const int64_t at = item / cut.groups, group = item % cut.groups;
        const int64_t begin = at * cut.tiles, end = std::min(begin + cut.tiles, s.tiles());
        if (at != transformed) transform_inputs(px, s, begin, end, scratch);
        transformed = at;
        const int64_t stop = (group + 1) * packing.blocks() / cut.groups;
        for (int64_t block = group * packing.blocks() / cut.groups; block < stop; ++block) {
          const int64_t width = packing.width(block);
          (width == kWide ? multiply_points<kWide> : multiply_points<1>)(weights + packing.offset(block), s.c,
                                                                         end - begin, scratch);
          epilogue(s, begin, end, packing.first(block), width, scratch);
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&winograd_pack));
  m.impl("winograd_conv_bn_act", TORCH_BOX(&winograd_conv_bn_act));
}

}  // namespace fastres
