// Kernels that are wrong in one thing each, which would show on a GPU only now and then: the emulator must refuse them.
#include <cstdio>
#include <new>

#include "launch.h"
#include "ptx_cluster.cuh"

namespace {

using namespace fastres;

struct Wrong {
  TensorMap map;
  int what;
};

void wrong_kernel(Wrong p) {
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(memory);
  float sum[16];
  switch (p.what) {
    case 0:  // nothing
    case 1:  // the registers are not fenced, of the first product or of one after a wait
    case 2:
      if (p.what != 1) ptx::wgmma_fence();
      for (int twice = 0; twice < 2; ++twice) {
        if (p.what == 0 && twice) ptx::wgmma_fence();
        ptx::wgmma(sum, matrix_descriptor(base), matrix_descriptor(base), false, __half{});
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>(sum);
      }
      return;
    case 3:  // everything fenced, or one thread not before a store
    case 4:
      reinterpret_cast<int*>(memory)[threadIdx.x] = 1;
      if (p.what == 3 || threadIdx.x != 5) ptx::fence_async_shared();
      ptx::sync_threads();
      if (threadIdx.x == 0) ptx::store_box(&p.map, base, 0, 0), ptx::store_commit(), ptx::store_wait_all();
      return;
    case 5:  // more bytes than a barrier counts
      if (threadIdx.x == 0) {
        ptx::barrier_init(base, 1);
        ptx::barrier_arrive_expect(base, 1 << 20);
      }
  }
}

}  // namespace

// Returns 0, or 1 and the emulator's words in `error` [256].
extern "C" __attribute__((visibility("default"))) int emulator_refusal(int what, char* error) {
  alignas(16) static uint16_t tensor[8][64];
  try {
    TensorMapFields f{Type::kFp16, 2, tensor};
    f.size[0] = f.box[0] = 64, f.size[1] = f.box[1] = 8, f.stride[0] = 128;
    const Record record = make_record(wrong_kernel, Shape{dim3(1), 128, 16384}, Wrong{make_tensor_map(f), what}, "wrong");
    launch(&record, 1, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 256, "%s", e.what());
    return 1;
  }
}

// A map made where its caller keeps it, `offset` bytes past a multiple of 64 as g++'s temporaries are: 0, or the
// emulator's words in `error` [256].
extern "C" __attribute__((visibility("default"))) int emulator_map_refusal(int offset, char* error) {
  alignas(64) static unsigned char tensor[1024], kept[64 + sizeof(TensorMap)];
  try {
    TensorMapFields f{Type::kFp16, 2, tensor};
    f.size[0] = f.box[0] = 64, f.size[1] = f.box[1] = 8, f.stride[0] = 128;
    ::new (kept + offset) TensorMap(make_tensor_map(f));
    if (std::memcmp(kept + offset, &f, sizeof f)) throw std::runtime_error("the map is another");
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 256, "%s", e.what());
    return 1;
  }
}
