// A CUDA driver that runs nothing and remembers: what Triton's launchers would hand to the real one.
//
// cuTensorMapEncodeTiled writes its arguments into the map (or refuses, if told so); cuLaunchKernelEx copies the
// launch's configuration and parameters, whose sizes the test tells beforehand.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, MOST = 4096 };

typedef struct {
  uint64_t address;
  int32_t dtype, rank, swizzle, interleave;
  uint32_t box[5];
  uint32_t unused;
  uint64_t dims[5];
  uint64_t strides[4];
} Map;  // 116 bytes and padding: fits into a CUtensorMap's 128

_Static_assert(sizeof(Map) <= 128, "a map is 128 bytes");

typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
} Config;

Config recorded_config;
int recorded_launches, refuse_maps, parameter_count, parameter_sizes[256];
unsigned char recorded_parameters[MOST];

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }
int cuDeviceGetCount(int* count) { *count = 1; return SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 75: *value = 9; break;                       // compute capability, major
    case 76: *value = 0; break;                       // minor
    case 97: *value = 232448; break;                  // shared memory of a block, opt-in
    case 81: *value = 233472; break;                  // of a multiprocessor
    default: *value = 1024;
  }
  return SUCCESS;
}
int cuCtxGetCurrent(void** context) { *context = (void*)1; return SUCCESS; }
int cuCtxSetCurrent(void* context) { return SUCCESS; }
int cuCtxGetDevice(int* device) { *device = 0; return SUCCESS; }
int cuCtxGetLimit(size_t* value, int limit) { *value = 0; return SUCCESS; }
int cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)1; return SUCCESS; }
int cuModuleLoadData(void** module, const void* image) { *module = (void*)2; return SUCCESS; }
int cuModuleUnload(void* module) { return SUCCESS; }
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = (void*)3; return SUCCESS; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { *value = attribute == 0 ? 1024 : 0; return SUCCESS; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return SUCCESS; }
int cuFuncSetCacheConfig(void* function, int config) { return SUCCESS; }
int cuGetErrorString(int error, const char** text) { *text = "refused by the test"; return SUCCESS; }
int cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return INVALID_VALUE; }
int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  memcpy(value, &pointer, 8);
  return SUCCESS;
}

int cuTensorMapEncodeIm2col(void* map) { return INVALID_VALUE; }
int cuTensorMapEncodeTiled(void* map, int dtype, uint32_t rank, void* address, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                           int interleave, int swizzle, int promotion, int fill) {
  if (refuse_maps || (uintptr_t)map % 64) return INVALID_VALUE;
  Map made = {.address = (uint64_t)address, .dtype = dtype, .rank = (int32_t)rank, .swizzle = swizzle,
              .interleave = interleave};
  for (uint32_t i = 0; i < rank; ++i) {
    made.dims[i] = dims[i];
    made.box[i] = box[i];
    if (i + 1 < rank) made.strides[i] = strides[i];
    if (element_strides[i] != 1) return INVALID_VALUE;
  }
  memset(map, 0xEE, 128);
  memcpy(map, &made, sizeof made);
  return SUCCESS;
}

int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  recorded_config = *config;
  ++recorded_launches;
  unsigned char* at = recorded_parameters;
  for (int i = 0; i < parameter_count; ++i) {
    if (at + parameter_sizes[i] > recorded_parameters + MOST) return INVALID_VALUE;
    memcpy(at, parameters[i], parameter_sizes[i]);
    at += parameter_sizes[i];
  }
  return SUCCESS;
}
