// Memory of ops on the CPU, in huge pages where Linux gives them: of 4 KiB pages an activation has thousands, each of
// which costs a page fault when it is new, and a walk of the page table when the core has forgotten it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace vitfast {

// Memory that an engine's forwards leave to each other, so that after the first none asks the system for any. It has
// as much as was in use at one time and no more; what is idle goes back with the pool. Safe in several threads.
class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  MemoryPool() = default;
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;
  ~MemoryPool();

  // From enter to exit outputs of ops that this thread calls come from the pool. Pools may be nested.
  void enter();
  static void exit();

  c10::DataPtr take(size_t bytes);
  size_t idle_bytes() const;

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  struct Loan;
  void give_back(Block block);

  mutable std::mutex mutex_;
  std::vector<Block> idle_;  // the one that was given back last at the end
  size_t idle_bytes_ = 0, used_bytes_ = 0, most_used_bytes_ = 0;
};

// As at::empty: for what an op returns, from the pool that was entered, if it is large.
at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options);

// As at::empty, for a packed weight.
at::Tensor empty_weight(at::IntArrayRef sizes, const at::TensorOptions& options);

// Memory of the calling thread, aligned to a cache line, until its next call: kept between calls unless it is large.
class Scratch {
 public:
  static void* of(size_t bytes);
  ~Scratch();

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace vitfast
