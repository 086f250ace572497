// A row of launches in which one kernel does too early what griddepcontrol.wait is for: the emulator must show it.
#include <algorithm>

#include "launch.h"
#include "ptx.cuh"

namespace {

using namespace fastres;

constexpr int kThreads = 64;

struct Copy {
  const int* from;
  int* to;
  int barriers;  // that take time before the copy
  bool waits;
};

void copy_kernel(Copy p) {
  ptx::let_successor_start();
  if (p.waits) ptx::wait_for_predecessor();
  for (int i = 0; i < p.barriers; ++i) ptx::sync_threads();
  p.to[threadIdx.x] = p.from[threadIdx.x];
  // A kernel that did not wait before it copied waits now, as every kernel must before it ends.
  if (!p.waits) ptx::wait_for_predecessor();
}

}  // namespace

// a → b, b → c, d → a, of 64 numbers 1, 2, 3, 4. `early`: the number of the launch that copies before it waits, or -1.
// Returns b * 100 + c * 10 + a; 114 is right.
extern "C" __attribute__((visibility("default"))) int emulator_overlap(int early, bool overlap) {
  int a[kThreads], b[kThreads], c[kThreads], d[kThreads];
  std::fill_n(a, kThreads, 1), std::fill_n(b, kThreads, 2), std::fill_n(c, kThreads, 3), std::fill_n(d, kThreads, 4);
  const Copy copies[] = {{a, b, 9, early != 0}, {b, c, 0, early != 1}, {d, a, 0, early != 2}};
  Record row[3];
  for (int i = 0; i < 3; ++i) {
    row[i] = make_record(copy_kernel, Shape{dim3(1), kThreads}, copies[i], "copy");
    row[i].programmatic = overlap;
  }
  launch(row, 3, nullptr);
  return b[kThreads - 1] * 100 + c[kThreads - 1] * 10 + a[kThreads - 1];
}
