// Tensor maps, encoded by the driver: its function is found at run time, so that the library needs no libcuda to load.
// They are made once, when a kernel is bound to its memory, and travel in the record.
#include "sm90.h"

#ifndef FASTRES_EMULATOR
#include <cuda.h>
#endif

namespace fastres {

#ifdef FASTRES_EMULATOR
TensorMap make_tensor_map(const TensorMapFields& fields) {
  TensorMap map{};
  std::memcpy(map.opaque, &fields, sizeof fields);
  return map;
}
#else
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#endif
  if (found != cudaDriverEntryPointSuccess || !function)
    throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
  return reinterpret_cast<Encode>(function);
}

}  // namespace

TensorMap make_tensor_map(const TensorMapFields& f) {
  static const Encode encode = encoder();
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  TensorMap map{};
  cuuint64_t size[5], stride[5];
  cuuint32_t box[5], step[5];
  for (int d = 0; d < f.rank; ++d) {
    size[d] = f.size[d], box[d] = f.box[d], step[d] = 1;
    if (d) stride[d - 1] = f.stride[d - 1];
  }
  const CUresult status = encode(
      reinterpret_cast<CUtensorMap*>(&map),
      f.type == Type::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      static_cast<cuuint32_t>(f.rank), const_cast<void*>(f.base), size, stride, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled refuses the map: CUresult " + std::to_string(status));
  return map;
}
#endif

}  // namespace fastres
