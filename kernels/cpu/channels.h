// The loop of all ops that are element-wise with K numbers per channel.
#pragma once

#include <memory>
#include <numeric>

#include "tensor.h"

namespace fastres {

// K numbers per channel. In rows of channels they are repeated until a whole number of vectors holds a whole
// number of rows, so that no row needs a tail, whatever C is.
template <class A, int K>
class ChannelTable {
 public:
  explicit ChannelTable(const Dense& d) : channels_(d.c), period_(d.c) {
    if (d.nhwc && d.c > 0) {
      period_ = std::lcm(d.c, int64_t{kLanes<A>});
      while (period_ < 256) period_ *= 2;
    }
    numbers_ = std::make_unique_for_overwrite<A[]>(K * std::max<int64_t>(period_, 1));
  }
  // Set the numbers of channel c.
  void set(int64_t c, const A (&numbers)[K]) {
    for (int k = 0; k < K; ++k)
      for (int64_t i = c; i < period_; i += channels_) numbers_[k * period_ + i] = numbers[k];
  }
  int64_t period() const { return period_; }
  const A* operator[](int k) const { return numbers_.get() + k * period_; }

 private:
  int64_t channels_, period_;
  std::unique_ptr<A[]> numbers_;
};

// f(offset, numbers, lanes) for every vector of a tensor: numbers[k] are vectors, lanes is Full or Tail.
template <class T, int K, class F>
void map_channels(const Dense& d, const ChannelTable<Acc<T>, K>& table, const F& f) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t W = kLanes<A>;
  if (d.numel() == 0) return;
  if (d.nhwc) {
    const int64_t period = table.period(), whole = d.numel() / W;
    const auto at = [&](int64_t i, V(&numbers)[K]) {
      for (int k = 0; k < K; ++k) numbers[k] = load(table[k] + i);
    };
    parallel_for(0, whole, kGrain / W, [&](int64_t begin, int64_t end) {
      V numbers[K];
      for (int64_t i = begin * W, stop = end * W; i < stop;) {
        int64_t j = i % period;
        for (const int64_t run = std::min(stop, i + period - j); i < run; i += W, j += W) {
          at(j, numbers);
          f(i, numbers, Full{});
        }
      }
    });
    if (const int64_t i = whole * W; i < d.numel()) {
      V numbers[K];
      at(i % period, numbers);
      f(i, numbers, Tail{static_cast<int>(d.numel() - i)});
    }
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / d.s);
  parallel_for(0, d.n * d.c, grain, [&](int64_t begin, int64_t end) {
    V numbers[K];
    for (int64_t plane = begin; plane < end; ++plane) {
      for (int k = 0; k < K; ++k) numbers[k] = splat(table[k][plane % d.c]);
      int64_t i = plane * d.s;
      const int64_t stop = i + d.s;
      for (; i + W <= stop; i += W) f(i, numbers, Full{});
      if (i < stop) f(i, numbers, Tail{static_cast<int>(stop - i)});
    }
  });
}

}  // namespace fastres
