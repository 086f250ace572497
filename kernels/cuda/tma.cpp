// Tensor maps, encoded by the driver: its function is found at run time, so that the library needs no libcuda to load.
// They are made once, when a kernel is bound to its memory, and travel in the record.
#include "sm90.h"

#ifdef FASTRES_EMULATOR
#include "emulated_tma.h"
#else
#include <cuda.h>
#endif

namespace fastres {

#ifdef FASTRES_EMULATOR
using emulator::encode;
#else
namespace {

template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
#else
  check(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found), name);
#endif
  if (found != cudaDriverEntryPointSuccess || !function)
    throw std::runtime_error(std::string("the driver has no ") + name + ": it is older than CUDA 12.0");
  return reinterpret_cast<Function>(function);
}

// The driver encodes with a context alone, and a thread that only asked which device is current has none. Since CUDA 12
// this binds the device's.
void need_context() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
}

void encode(void* map, const TensorMapFields& f) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  need_context();
  auto* to = static_cast<CUtensorMap*>(map);
  cuuint64_t size[5], stride[5];
  cuuint32_t box[5], step[5];
  for (int d = 0; d < f.rank; ++d) {
    // CUDA's box counts the elements between, too.
    size[d] = f.size[d], box[d] = f.box[d] * f.step[d], step[d] = f.step[d];
    if (d) stride[d - 1] = f.stride[d - 1];
  }
  const auto type = f.type == Type::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto rank = static_cast<cuuint32_t>(f.rank);
  void* base = const_cast<void*>(f.base);
  constexpr auto kPlain = CU_TENSOR_MAP_INTERLEAVE_NONE;
  constexpr auto kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  constexpr auto kZeros = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  CUresult status;
  const char* name;
  if (f.traversal[0]) {
    name = "cuTensorMapEncodeIm2col";
    static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>(name);
    const int lower[] = {f.lower[0], f.lower[1]}, upper[] = {f.upper[0], f.upper[1]};
    step[1] = f.traversal[0], step[2] = f.traversal[1];
    status = encode(to, type, rank, base, size, stride, lower, upper, box[0], box[1], step, kPlain, kSwizzle, kPromotion,
                    kZeros);
  } else {
    name = "cuTensorMapEncodeTiled";
    static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>(name);
    status = encode(to, type, rank, base, size, stride, box, step, kPlain, kSwizzle, kPromotion, kZeros);
  }
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string(name) + " refuses the map: CUresult " + std::to_string(status));
}

}  // namespace
#endif

TensorMap make_tensor_map(const TensorMapFields& fields) {
  // The driver refuses a map at no multiple of 64. g++ 12 keeps what `p.x = make_tensor_map(...)` returns in a temporary
  // at a multiple of 16, whatever alignas says; a variable lies where it should.
  alignas(64) unsigned char encoded[sizeof(TensorMap)];
  encode(encoded, fields);
  TensorMap map;
  std::memcpy(map.opaque, encoded, sizeof encoded);
  return map;
}

}  // namespace fastres
