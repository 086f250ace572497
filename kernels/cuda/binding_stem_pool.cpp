// torch.ops.fastres_cuda.sm90_stem_pool: the checks of its arguments, and its record.
#include "conv_arguments.h"
#include "stem_pool.h"

namespace fastres {
namespace {

// normalize: (factor, offset) by channel of uint8 images; none for images in out's type.
void sm90_stem_pool(const Tensor& x, const Tensor& weight, const Tensor& constants, const Optional& normalize,
                    const Tensor& out, int64_t rows, const Tensor& record) {
  check_device(x, "x");
  check_same_device(out, x, "out");
  check_nhwc(out, "out");
  const Type type = type_of(out, "out");
  FASTRES_CHECK_TYPE(type == Type::kBf16 || type == Type::kFp16, "out is ", name_of(out.scalar_type()),
                     ", expected bfloat16 or float16");
  const ScalarType wanted = normalize ? ScalarType::Byte : out.scalar_type();
  FASTRES_CHECK_TYPE(x.scalar_type() == wanted, "x is ", name_of(x.scalar_type()), ", expected ", name_of(wanted));
  FASTRES_CHECK(x.dim() == 4 && x.size(1) == 3 && x.numel() > 0, "x has the shape ", shape_of(x.sizes()),
                ", expected [N, 3, H, W]");
  FASTRES_CHECK(x.numel() < int64_t{1} << 31, "x has ", x.numel(), " elements, fewer than 2^31 are taken");
  const bool nhwc = is_dense(x, true);
  FASTRES_CHECK(nhwc || is_dense(x, false), "x must be dense, contiguous or channels_last, it has the shape ",
                shape_of(x.sizes()), " and the strides ", shape_of(x.strides()));
  const auto half = [](int64_t v) { return static_cast<int>((v + 1) / 2); };
  StemPool p{};
  p.h = static_cast<int>(x.size(2)), p.w = static_cast<int>(x.size(3));
  p.p = half(p.h), p.q = half(p.w), p.pooled_h = half(p.p), p.pooled_w = half(p.q);
  check_shape(out, {x.size(0), kStemChannels, p.pooled_h, p.pooled_w}, "out");
  check_matrix(weight, out, kStemBlocks * kStemChannels, kStemDepth, "weight");
  FASTRES_CHECK(rows >= 1 && rows < 1 << 15, "rows is ", rows, ", expected 1 or more");
  p.x = pointer(x), p.weight = pointer(weight), p.out = pointer(out);
  p.constants = check_pairs(constants, x, kStemChannels, "constants");
  if (normalize) p.normalize = check_pairs(*normalize, x, 3, "normalize");
  p.stride_n = int64_t{3} * p.h * p.w;
  p.stride_c = nhwc ? 1 : p.h * p.w, p.stride_h = nhwc ? 3 * p.w : p.w, p.stride_w = nhwc ? 3 : 1;
  const auto aligned = [&](int bytes) { return reinterpret_cast<uintptr_t>(p.x) % bytes == 0; };
  p.paired = !nhwc && p.w % 2 == 0 && aligned(normalize ? 2 : 4);
  p.rows = static_cast<int>(rows);
  p.tiles_h = static_cast<int>(ceil_div(p.pooled_h, rows));
  p.tiles_w = static_cast<int>(ceil_div(p.pooled_w, kStemColumns));
  p.tiles = static_cast<int>(x.size(0)) * p.tiles_h * p.tiles_w;
  const StemSource source = normalize                              ? StemSource::kBytes
                            : nhwc && p.w % 8 == 0 && aligned(16) ? StemSource::kPieces
                                                                   : StemSource::kPixels;
  finish_record(x, record, [&] { return stem_pool_record(p, type, source); });
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CompositeExplicitAutograd, m) {
  m.impl("sm90_stem_pool", TORCH_BOX(&fastres::sm90_stem_pool));
}
