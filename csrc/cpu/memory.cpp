#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vitfast {
namespace {

constexpr size_t kHugePage = 1 << 21, kLine = 64;
constexpr size_t kLeastPooled = 1 << 16;   // smaller tensors are malloc's, which keeps such by itself
constexpr size_t kMostScratch = 16 << 20;  // that a thread keeps

// Whole huge pages are the system's to give: where it does not, these are plain ones.
void* allocate(size_t bytes) {
  void* data = nullptr;
  const bool huge = bytes >= kHugePage / 2;
  const int failed = posix_memalign(&data, huge ? kHugePage : kLine, std::max<size_t>(bytes, 1));
  TORCH_CHECK(failed == 0, "vitfast: can't allocate memory: you tried to allocate ", bytes, " bytes");  // as torch says
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (huge) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

thread_local std::vector<std::shared_ptr<MemoryPool>> entered;

// For at::empty_generic. Like torch's own, but for where the memory comes from.
template <c10::DataPtr (*take)(size_t), c10::DeleterFnPtr deleter>
struct Source final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return take(bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return deleter; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

c10::DataPtr take_weight(size_t bytes) {
  void* data = allocate(bytes);
  return {data, data, &std::free, c10::Device(c10::kCPU)};
}

c10::DataPtr take_pooled(size_t bytes) {
  return entered.empty() ? take_weight(bytes) : entered.back()->take(bytes);  // a resized output may come later
}

size_t bytes_of(at::IntArrayRef sizes, const at::TensorOptions& options) {
  size_t bytes = options.dtype().itemsize();
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) return 0;  // at::empty says what is wrong
  }
  return bytes;
}

template <typename From>
at::Tensor empty(From& from, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::detail::empty_generic(sizes, &from, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace

struct MemoryPool::Loan {
  std::shared_ptr<MemoryPool> pool;
  Block block;
  static void end(void* loan) {
    const std::unique_ptr<Loan> ended(static_cast<Loan*>(loan));
    ended->pool->give_back(ended->block);
  }
};

MemoryPool::~MemoryPool() {
  for (const Block& block : idle_) std::free(block.data);
}

void MemoryPool::enter() { entered.push_back(shared_from_this()); }
void MemoryPool::exit() { entered.pop_back(); }

size_t MemoryPool::idle_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return idle_bytes_;
}

c10::DataPtr MemoryPool::take(size_t bytes) {
  const size_t step = bytes < kHugePage / 2 ? kLeastPooled : kHugePage;
  Block block{nullptr, (bytes + step - 1) / step * step};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();  // the smallest that is large enough; of those, the one that is most likely in cache
    for (auto one = idle_.begin(); one != idle_.end(); ++one) {
      if (one->bytes >= block.bytes && (best == idle_.end() || one->bytes <= best->bytes)) best = one;
    }
    if (best != idle_.end()) {
      block = *best;
      idle_.erase(best);
      idle_bytes_ -= block.bytes;
    }
  }
  if (!block.data) block.data = allocate(block.bytes);  // or throw, before anything is counted
  auto loan = std::make_unique<Loan>(Loan{shared_from_this(), block});
  const std::lock_guard<std::mutex> lock(mutex_);
  used_bytes_ += block.bytes;
  most_used_bytes_ = std::max(most_used_bytes_, used_bytes_);
  while (used_bytes_ + idle_bytes_ > most_used_bytes_ && !idle_.empty()) {
    std::free(idle_.front().data);
    idle_bytes_ -= idle_.front().bytes;
    idle_.erase(idle_.begin());
  }
  return {block.data, loan.release(), &Loan::end, c10::Device(c10::kCPU)};
}

void MemoryPool::give_back(Block block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(block);
  idle_bytes_ += block.bytes;
  used_bytes_ -= block.bytes;
}

at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static Source<&take_pooled, nullptr> source;
  const at::Context& context = at::globalContext();  // who looks for numbers that are never written has them filled in
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (entered.empty() || filled || bytes_of(sizes, options) < kLeastPooled) return at::empty(sizes, options);
  return empty(source, sizes, options);
}

at::Tensor empty_weight(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static Source<&take_weight, &std::free> source;
  return bytes_of(sizes, options) < kHugePage / 2 ? at::empty(sizes, options) : empty(source, sizes, options);
}

void* Scratch::of(size_t bytes) {
  static thread_local Scratch mine;
  if (mine.bytes_ < bytes || mine.bytes_ > kMostScratch) {
    std::free(mine.data_);
    mine.data_ = nullptr, mine.bytes_ = 0;  // should there be no memory
    mine.data_ = allocate(bytes);
    mine.bytes_ = bytes;
  }
  return mine.data_;
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace vitfast
