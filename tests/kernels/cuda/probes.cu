// One belief about the hardware at a time, each shown by what a few instructions leave in memory: probing.py calls these on
// a GPU, where they have nvcc's build of this file, and in the emulator. What comes out is judged in Python, by arithmetic
// that is neither's.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "epilogue.cuh"
#include "ptx_l2.cuh"
#include "wgmma_wide.cuh"

namespace fastres {
namespace {

constexpr int kImage = 64 * 1024;  // of shared memory, that is shown
constexpr int kShared = kImage + 64;

// The wait of a kernel, but it gives up: what did not come is then missing in what is shown.
FASTRES_DEVICE int comes(uint32_t barrier, uint32_t parity) {
#ifdef FASTRES_EMULATOR
  ptx::barrier_wait(barrier, parity);
  return 1;
#elif defined(FASTRES_SM90)
  for (int i = 0; i < 100000; ++i) {
    uint32_t done;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    if (done) return 1;
    __nanosleep(100);
  }
  return 0;
#else
  return 0;
#endif
}

FASTRES_DEVICE void fill_image(unsigned char* memory, const unsigned char* from) {
  for (int i = static_cast<int>(threadIdx.x); i < kImage; i += static_cast<int>(blockDim.x)) memory[i] = from ? from[i] : 0xff;
}
FASTRES_DEVICE void show_image(unsigned char* out, const unsigned char* memory) {
  for (int i = static_cast<int>(threadIdx.x); i < kImage; i += static_cast<int>(blockDim.x)) out[i] = memory[i];
}

struct Probe {
  TensorMap map;
  int rank, im2col, c[5], offset[2], bytes, choice;
  const unsigned char* in;
  unsigned char* out;
  int* status;
};

// A box, or a run of windows, into shared memory. choice: with a word on what the L2 may evict, 1 first, 2 last.
__global__ void load_kernel(const __grid_constant__ Probe p) {
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(memory), barrier = base + kImage;
  fill_image(memory, nullptr);
  ptx::fence_async_shared();
  if (threadIdx.x == 0) ptx::barrier_init(barrier, 1), ptx::fence_barrier_init();
  ptx::sync_threads();
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&p.map);
    ptx::barrier_arrive_expect(barrier, p.bytes);
    const int* c = p.c;
    const ptx::Policy policy = ptx::make_policy(static_cast<Eviction>(p.choice));
    if (p.choice && p.im2col) {
      ptx::load_im2col(base, &p.map, barrier, c[0], c[1], c[2], c[3], p.offset[0], p.offset[1], policy);
    } else if (p.choice && p.rank == 2) {
      ptx::load_box(base, &p.map, barrier, c[0], c[1], policy);
    } else if (p.choice && p.rank == 3) {
      ptx::load_box(base, &p.map, barrier, c[0], c[1], c[2], policy);
    } else if (p.choice && p.rank == 4) {
      ptx::load_box(base, &p.map, barrier, c[0], c[1], c[2], c[3], policy);
    } else if (p.im2col) {
      ptx::load_im2col(base, &p.map, barrier, c[0], c[1], c[2], c[3], p.offset[0], p.offset[1]);
    } else if (p.rank == 2) {
      ptx::load_box(base, &p.map, barrier, c[0], c[1]);
    } else if (p.rank == 3) {
      ptx::load_box(base, &p.map, barrier, c[0], c[1], c[2]);
    } else if (p.rank == 4) {
      ptx::load_box(base, &p.map, barrier, c[0], c[1], c[2], c[3]);
    } else {
      ptx::load_box(base, &p.map, barrier, c[0], c[1], c[2], c[3], c[4]);
    }
    p.status[0] = comes(barrier, 0);
    p.status[1] = static_cast<int>(base % 1024);
  }
  ptx::sync_threads();
  show_image(p.out, memory);
}

// A box from shared memory, over the edge of the tensor.
__global__ void store_kernel(const __grid_constant__ Probe p) {
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(memory);
  fill_image(memory, p.in);
  ptx::fence_async_shared();
  ptx::sync_threads();
  if (threadIdx.x == 0) {
    if (p.rank == 2) {
      ptx::store_box(&p.map, base, p.c[0], p.c[1]);
    } else if (p.rank == 3) {
      ptx::store_box(&p.map, base, p.c[0], p.c[1], p.c[2], ptx::make_policy(Eviction::kFirst));
    } else {
      ptx::store_box(&p.map, base, p.c[0], p.c[1], p.c[2], p.c[3]);
    }
    ptx::store_commit();
    ptx::store_wait_read<0>();
    ptx::store_wait_all();
    p.status[0] = 1;
  }
}

// Two blocks: each loads half of a box for both; arrives at both; rank 0 writes a word to both; each reads the other's.
__global__ void cluster_kernel(const __grid_constant__ Probe p) {
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(memory), full = base + kImage, met = full + 8, told = met + 8;
  const int rank = static_cast<int>(ptx::cluster_rank()), half = p.bytes / 2, word = kImage - 64, four = kImage - 32;
  int* status = p.status + 6 * rank;
  fill_image(memory, nullptr);
  ptx::fence_async_shared();
  if (threadIdx.x == 0) {
    ptx::barrier_init(full, 1), ptx::barrier_init(met, 2), ptx::barrier_init(told, 1);
    ptx::fence_barrier_init();
  }
  ptx::sync_warp();
  ptx::sync_cluster();
  if (threadIdx.x == 0) {
    ptx::barrier_arrive_expect(full, p.bytes);
    ptx::load_box_multicast(base + rank * half, &p.map, full, p.c[0], p.c[1], p.c[2] + rank * half / kSwizzleRow, 3);
    status[0] = comes(full, 0);
    for (int to = 0; to < 2; ++to) ptx::barrier_arrive_cluster(ptx::address_in(met, to));
    status[1] = comes(met, 0);
    if (rank == 0) {
      for (int to = 0; to < 2; ++to) ptx::store_cluster(ptx::address_in(base + word, to), 4321 + to);
      if (p.choice) ptx::fence_cluster();
      for (int to = 0; to < 2; ++to) ptx::barrier_arrive_cluster(ptx::address_in(told, to));
    }
    status[2] = comes(told, 0);
    status[3] = *reinterpret_cast<const volatile int*>(memory + word);
    *reinterpret_cast<float4*>(memory + four) = float4{1.f + rank, 2, 3, 4};
    status[5] = static_cast<int>(blockIdx.x) * 10 + rank;
  }
  ptx::sync_warp();
  ptx::sync_cluster_shared();
  if (threadIdx.x == 0) status[4] = static_cast<int>(ptx::load_cluster(ptx::address_in(base + four, rank ^ 1)).x);
  show_image(p.out + rank * kImage, memory);
  ptx::sync_warp();
  ptx::arrive_cluster_relaxed();
  ptx::wait_cluster();
}

// out [64, N] = 2 a b: a [64, 64] of shared memory or, with kRegisters, of registers, b [N, 64] seven groups of rows further,
// the first time without what the accumulators held.
template <class T, int kN, bool kRegisters>
__global__ void __launch_bounds__(128) wgmma_kernel(const __grid_constant__ Probe p) {
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(memory);
  constexpr int kB = 64 * kSwizzleRow + 7 * 1024;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const auto* in = reinterpret_cast<const uint4*>(p.in);
  for (int i = thread; i < (64 + kN) * 8; i += 128) {
    const int row = i / 8, at = row < 64 ? row : row - 64;
    *reinterpret_cast<uint4*>(memory + (row < 64 ? 0 : kB) + at / 8 * 1024 + swizzle_128(at % 8, i % 8)) = in[i];
  }
  ptx::fence_async_shared();
  ptx::sync_threads();
  float sum[kN / 2];
  for (float& v : sum) v = NAN;
  const uint64_t a = matrix_descriptor(base), b = matrix_descriptor(base + kB);
  for (int twice = 0; twice < 2; ++twice) {
    uint32_t fragment[4][4];
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < 4; ++i)
        fragment[k][i] = reinterpret_cast<const uint32_t*>(
            p.in)[(warp * 16 + lane / 4 + i % 2 * 8) * 32 + k * 8 + i / 2 * 4 + lane % 4];
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (kRegisters) {
        ptx::wgmma(sum, fragment[k], b + k * kDescriptorStep, twice > 0 || k > 0, T{});
      } else {
        ptx::wgmma(sum, a + k * kDescriptorStep, b + k * kDescriptorStep, twice > 0 || k > 0, T{});
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(sum);
  }
  auto* out = reinterpret_cast<float*>(p.out);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i)
    out[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i];
  if (thread == 0) p.status[0] = 1;
}

// Four 8 x 8 matrices, read transposed into registers (out, 4 words a lane), and written transposed from them (512 bytes).
__global__ void matrices_kernel(const __grid_constant__ Probe p) {
  unsigned char* memory = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(memory);
  fill_image(memory, p.in);
  ptx::sync_threads();
  uint32_t r[4];
  ptx::load_transposed_x4(r, base + threadIdx.x * 16);
  ptx::store_transposed_x4(base + 512 + threadIdx.x * 16, r);
  ptx::sync_threads();
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(p.out)[threadIdx.x * 4 + i] = r[i];
  for (int i = 0; i < 16; ++i) p.out[512 + threadIdx.x * 16 + i] = memory[512 + threadIdx.x * 16 + i];
  p.status[0] = 1;
}

// Roles share registers out as sm90_conv_bn_act does: it ends, if the sum is what a block has. out: by thread, whether it
// was elected, the first time (1) and the second (2).
__global__ void __launch_bounds__(384, 1) registers_kernel(const __grid_constant__ Probe p) {
  if (threadIdx.x < 128) {
    ptx::give_registers<40>();
  } else {
    ptx::take_registers<232>();
  }
  p.out[threadIdx.x] = (ptx::elect_one() ? 1 : 0) + (ptx::elect_one() ? 2 : 0);
  ptx::sync_threads();
  if (threadIdx.x == 0) p.status[0] = 1;
}

// to[i] = from[i] + 1, a while after its predecessor could have let it start; in clusters.
struct Link {
  const int* from;
  int* to;
};
__global__ void chain_kernel(const __grid_constant__ Link p) {
  ptx::let_successor_start();
  ptx::wait_for_predecessor();
#ifndef FASTRES_EMULATOR
  __nanosleep(20000);
#endif
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  p.to[i] = p.from[i] + 1;
}

using Kernel = void (*)(Probe);
template <class T>
Kernel wgmma_of(int n, bool registers) {
  switch (n) {
    case 32: return wgmma_kernel<T, 32, false>;
    case 64: return registers ? wgmma_kernel<T, 64, true> : wgmma_kernel<T, 64, false>;
    case 128: return wgmma_kernel<T, 128, false>;
    case 224: return wgmma_kernel<T, 224, false>;
    default: return registers ? wgmma_kernel<T, 256, true> : wgmma_kernel<T, 256, false>;
  }
}

// Memory of the device, and the way there and back.
#ifdef FASTRES_EMULATOR
void* allocate(size_t bytes) { return std::aligned_alloc(1024, round_up(static_cast<int64_t>(bytes), 1024)); }
void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
#else
void* allocate(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, std::max<size_t>(bytes, 1024)), "cudaMalloc");
  return p;
}
void copy(void* to, const void* from, size_t bytes) { check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy"); }
#endif

// arguments: type, rank, im2col; size[5], stride[4], box[5], lower[2], upper[2], traversal[2], step[5] of the map;
// c[5], offset[2], bytes of the load; choice.
void fill(Probe& p, const int64_t* a, const void* base) {
  TensorMapFields f{static_cast<Type>(a[0]), static_cast<int>(a[1]), base};
  p.rank = f.rank, p.im2col = static_cast<int>(a[2]);
  const int64_t* at = a + 3;
  const auto take = [&](auto& to) {
    for (auto& v : to) v = static_cast<std::remove_reference_t<decltype(v)>>(*at++);
  };
  take(f.size), take(f.stride), take(f.box), take(f.lower), take(f.upper), take(f.traversal), take(f.step);
  take(p.c), take(p.offset);
  p.bytes = static_cast<int>(*at++), p.choice = static_cast<int>(*at++);
  p.map = make_tensor_map(f);
}

// A row of 30 launches of clusters of two between two buffers, overlapping, replayed as a CUDA graph.
void run_chain(int* first, int* second) {
  std::vector<Record> row;
  for (int i = 0; i < 30; ++i) {
    const Link link{i % 2 ? second : first, i % 2 ? first : second};
    row.push_back(make_record(chain_kernel, Shape{dim3(4), 32, 0, i % 3 ? 2u : 1u}, link, "chain"));
    allow_overlap(row.back());
  }
#ifdef FASTRES_EMULATOR
  for (int i = 0; i < 4; ++i) launch(row.data(), 30, nullptr);
#else
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t made;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  launch(row.data(), 30, stream);
  check(cudaStreamSynchronize(stream), "a row of launches");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  launch(row.data(), 30, stream);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&made, graph, 0), "cudaGraphInstantiate");
  for (int i = 0; i < 3; ++i) check(cudaGraphLaunch(made, stream), "cudaGraphLaunch");
  check(cudaStreamSynchronize(stream), "a graph of launches");
#endif
}

void run(const std::string& name, const int64_t* arguments, const void* in, int64_t in_bytes, void* out, int64_t out_bytes,
         int* status) {
  auto* from = static_cast<unsigned char*>(allocate(std::max<int64_t>(in_bytes, kImage)));
  auto* to = static_cast<unsigned char*>(allocate(out_bytes));
  auto* said = static_cast<int*>(allocate(64));
  copy(from, in, in_bytes), copy(to, out, out_bytes), copy(said, status, 64);
  Probe p{};
  p.in = from, p.out = to, p.status = said;
  Shape shape{dim3(1), 128, kShared};
  Kernel kernel = nullptr;
  if (name == "load") {
    kernel = load_kernel, fill(p, arguments, from);
  } else if (name == "store") {
    kernel = store_kernel, fill(p, arguments, to);
  } else if (name == "cluster") {
    kernel = cluster_kernel, fill(p, arguments, from);
    shape.grid = dim3(2), shape.cluster = 2, shape.block = 32;
  } else if (name == "wgmma") {
    const int n = static_cast<int>(arguments[1]);
    kernel = arguments[0] == static_cast<int>(Type::kBf16) ? wgmma_of<bf16>(n, arguments[2]) : wgmma_of<fp16>(n, arguments[2]);
  } else if (name == "matrices") {
    kernel = matrices_kernel, shape.block = 32;
  } else if (name == "registers") {
    kernel = registers_kernel, shape.block = 384;
  } else if (name == "chain") {
    run_chain(reinterpret_cast<int*>(from), reinterpret_cast<int*>(to));
    copy(out, from, out_bytes);
    return;
  } else {
    throw std::runtime_error("no probe of this name");
  }
  const Record record = make_record(kernel, shape, p, name.c_str());
  launch(&record, 1, nullptr);
#ifndef FASTRES_EMULATOR
  check(cudaDeviceSynchronize(), name.c_str());
#endif
  copy(out, to, out_bytes), copy(status, said, 64);
}

}  // namespace
}  // namespace fastres

// in, out, status [16]: of the host. Returns 0, or 1 and the reason in `error` [256].
extern "C" __attribute__((visibility("default"))) int fastres_probe(const char* name, const int64_t* arguments,
                                                                    const void* in, int64_t in_bytes, void* out,
                                                                    int64_t out_bytes, int* status, char* error) {
  try {
    fastres::run(name, arguments, in, in_bytes, out, out_bytes, status);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 256, "%s", e.what());
    return 1;
  }
}
