// Work that threads share out among themselves while it is done: cores are not equally fast, as others use them, too.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace vitfast {

// Items of work in shares, one for each thread. It takes those of its own in order, and when there are no more, the
// last one of the share that has most left (work stealing: Blumofe and Leiserson 1999, "Scheduling multithreaded
// computations by work stealing").
class Work {
 public:
  struct Item {
    int64_t share, index;
  };

  // items: share -> how many, fewer than 2^32.
  template <typename Items>
  Work(int64_t shares, const Items& items) : shares_(shares), left_(new Left[shares]) {
    for (int64_t i = 0; i < shares; ++i) left_[i].range = static_cast<uint64_t>(items(i)) << 32;
  }

  // body(share), on torch's threads.
  template <typename Body>
  void run(const Body& body) const {
    at::parallel_for(0, shares_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t mine = begin; mine < end; ++mine) body(mine);
    });
  }

  // The next item for who has this share; false if all are taken.
  bool take(int64_t mine, Item& item) {
    for (int64_t from = mine; from >= 0; from = longest()) {
      uint64_t seen = left_[from].range.load(std::memory_order_relaxed);
      while (size(seen) > 0) {
        item = {from, from == mine ? first(seen) : first(seen) + size(seen) - 1};
        const uint64_t rest = from == mine ? seen + 1 : seen - kOneLess;
        if (left_[from].range.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) return true;
      }
    }
    return false;
  }

 private:
  // Items [first, end) that nobody has taken: `first` in the lower half, `end` in the upper one.
  struct alignas(64) Left {
    std::atomic<uint64_t> range;
  };
  static constexpr uint64_t kOneLess = uint64_t{1} << 32;
  static int64_t first(uint64_t range) { return static_cast<int64_t>(range & (kOneLess - 1)); }
  static int64_t size(uint64_t range) { return static_cast<int64_t>(range >> 32) - first(range); }

  // The share with most items left; -1 if there are none.
  int64_t longest() const {
    int64_t found = -1, most = 0;
    for (int64_t i = 0; i < shares_; ++i) {
      const int64_t left = size(left_[i].range.load(std::memory_order_relaxed));
      if (left > most) most = left, found = i;
    }
    return found;
  }

  int64_t shares_;
  std::unique_ptr<Left[]> left_;
};

// body(begin, end) for all of [0, size), `step` at a time, on torch's threads; each makes one body by make().
template <typename Make>
void share_out(int64_t size, int64_t step, const Make& make) {
  const int64_t items = (size + step - 1) / step, shares = std::min<int64_t>(at::get_num_threads(), items);
  const auto first_of = [&](int64_t share) { return items * share / shares; };
  Work work(shares, [&](int64_t share) { return first_of(share + 1) - first_of(share); });
  work.run([&](int64_t mine) {
    auto body = make();
    for (Work::Item item; work.take(mine, item);) {
      const int64_t begin = (first_of(item.share) + item.index) * step;
      body(begin, std::min(begin + step, size));
    }
  });
}

}  // namespace vitfast
