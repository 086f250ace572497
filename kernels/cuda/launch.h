// A kernel call that is ready to go: function, grid and parameters in one flat record, so that a whole plan is a row of
// records and launching it is one loop.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef FASTRES_EMULATOR
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

#ifdef __CUDACC__
#define FASTRES_BOTH __host__ __device__
#else
#define FASTRES_BOTH
#endif

namespace fastres {

FASTRES_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTRES_BOTH constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Element types, by the code that crosses the C++ boundary.
enum class Type : int { kBf16, kFp16, kFp32, kFp64 };

constexpr int kParameterBytes = 1408;
constexpr uint32_t kRecordMagic = 0xfa57e501;

struct alignas(64) Record {
  unsigned char parameters[kParameterBytes];  // first: tensor maps in it want 64-byte alignment
  const void* function;
  void (*invoke)(const void*, const void*);  // the emulator's way to call it
  uint32_t magic, grid[3], block, cluster, shared_bytes, programmatic;
  char name[64];  // of the kernel and its problem, for error messages
};
static_assert(sizeof(Record) == 1536, "fastres/backends/cuda_ops.py allocates this many bytes a record");
static_assert(std::is_trivially_copyable_v<Record>);

struct Shape {
  dim3 grid;
  unsigned block;
  unsigned shared_bytes = 0;
  unsigned cluster = 1;
};

#ifndef FASTRES_EMULATOR
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else whoever asks next, PyTorch for one, takes it for an error of its own
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
// What the current device gives a block of this function beside its own arrays.
inline int most_dynamic_shared(const void* function, const char* name) {
  int device = 0, bytes = 0;
  cudaFuncAttributes attributes;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  check(cudaFuncGetAttributes(&attributes, function), name);
  return bytes - static_cast<int>(attributes.sharedSizeBytes);
}
inline void set_dynamic_shared(const void* function, int bytes, const char* name) {
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
}
#else
inline int most_dynamic_shared(const void*, const char*) { return 227 * 1024; }
inline void set_dynamic_shared(const void* function, int bytes, const char*) {
  emulator::set_dynamic_shared(function, bytes);
}
#endif

template <class Parameters>
Record make_record(void (*kernel)(Parameters), const Shape& shape, const Parameters& parameters, const char* name) {
  static_assert(std::is_trivially_copyable_v<Parameters> && sizeof(Parameters) <= kParameterBytes);
  Record r{};
  std::memcpy(r.parameters, &parameters, sizeof parameters);
  r.function = reinterpret_cast<const void*>(kernel);
  r.magic = kRecordMagic;
  r.grid[0] = shape.grid.x, r.grid[1] = shape.grid.y, r.grid[2] = shape.grid.z;
  r.block = shape.block;
  r.cluster = shape.cluster;
  r.shared_bytes = shape.shared_bytes;
  std::strncpy(r.name, name, sizeof r.name - 1);
  if (shape.shared_bytes > 48 * 1024) {
    // The limit belongs to the function, and a smaller one would stop the records that are there already.
    const int most = most_dynamic_shared(r.function, name);
    if (static_cast<int>(shape.shared_bytes) > most)
      throw std::runtime_error(std::string(name) + ": " + std::to_string(shape.shared_bytes) +
                               " bytes of shared memory, a block may have " + std::to_string(most));
    set_dynamic_shared(r.function, most, name);
  }
#ifdef FASTRES_EMULATOR
  r.invoke = [](const void* function, const void* p) {
    alignas(64) Parameters copy = *static_cast<const Parameters*>(p);
    reinterpret_cast<void (*)(Parameters)>(const_cast<void*>(function))(copy);
  };
#endif
  return r;
}

// May overlap with the kernel before it: true for code compiled for sm_90 and later, which waits by itself before it
// reads what that kernel wrote. Code translated from older PTX has no such wait.
inline void allow_overlap(Record& r) {
#ifndef FASTRES_EMULATOR
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, r.function), r.name);
  r.programmatic = attributes.ptxVersion >= 90;
  // Kernels overlap only where the SM needs no other split of its L1: all have the same, small ones too.
  check(cudaFuncSetAttribute(r.function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        r.name);
#else
  r.programmatic = 1;
#endif
}

// `count` records one after the other, each overlapping its start with the end of the one before it.
//
// Why this is safe. A block's griddepcontrol.wait returns when the grid before its own has ended and its writes are
// visible. Every kernel waits in every thread before it ends, so that grid had seen the end of the one before it, and so
// on down to the first, which does not overlap: after its wait, a kernel finds all earlier ones done, and may write where
// any of them read. Before its wait it may run beside any number of them, so until then it reads constants alone (which
// none of them writes) and writes nothing.
#ifndef FASTRES_EMULATOR
inline void launch(const Record& r, bool overlap, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(r.grid[0], r.grid[1], r.grid[2]);
  config.blockDim = dim3(r.block);
  config.dynamicSmemBytes = r.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (r.cluster > 1) {
    auto& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = r.cluster, a.val.clusterDim.y = 1, a.val.clusterDim.z = 1;
  }
  if (overlap && r.programmatic) {
    auto& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {const_cast<unsigned char*>(r.parameters)};
  check(cudaLaunchKernelExC(&config, r.function, arguments), r.name);
}
inline void launch(const Record* records, int64_t count, cudaStream_t stream) {
  for (int64_t i = 0; i < count; ++i) {
    try {
      // The first may follow whatever wrote its constants.
      launch(records[i], i > 0, stream);
    } catch (const std::runtime_error& e) {
      throw std::runtime_error("records[" + std::to_string(i) + "] " + e.what());
    }
  }
}
#else
inline void launch(const Record* records, int64_t count, void*) {
  std::vector<emulator::Call> row;
  for (int64_t i = 0; i < count; ++i) {
    const Record& r = records[i];
    row.push_back({r.name, r.function, r.invoke, r.parameters, dim3(r.grid[0], r.grid[1], r.grid[2]), dim3(r.block),
                   r.shared_bytes, r.cluster, i > 0 && r.programmatic});
  }
  emulator::launch(row);
}
#endif

// Of the current device.
inline int multiprocessors() {
#ifdef FASTRES_EMULATOR
  return 4;
#else
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
#endif
}

}  // namespace fastres
