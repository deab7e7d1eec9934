// A thread block on the CPU, for csrc/device/atoms.cuh: each thread is a fiber, and the scheduler picks the next one
// at random, so that code which needs a barrier and has none meets every order sooner or later. Beside that, every
// word of shared memory remembers who wrote and read it since the last barrier, so that a race shows in any order.
//
// It lies with the tests and not in csrc: no build of the package needs it, and it may be as strict as it likes.
// What is wrong with a kernel is thrown as Trap: reads of shared memory that nobody wrote or whose copy is still
// under way, races, addresses out of bounds or not aligned, warps that part before an instruction of the whole warp,
// threads that wait for others that never come.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

struct Trap : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Memory of the device that a kernel may read, or write.
struct Range {
  const void* begin;
  size_t bytes;
  bool writable;
};

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_fp16(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof(x));
  return static_cast<float>(x);
}
inline uint16_t to_fp16(float x) {
  const _Float16 narrow = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  return bits;
}

class Block;
class Thread;
inline Thread*& current() {
  static Thread* running = nullptr;
  return running;
}

enum class State { ready, at_barrier, in_warp, done };

// What a lane brings to, and takes from, an instruction of its whole warp.
struct Operands {
  const char* what = nullptr;
  uint32_t in[8] = {};
  float accumulators[4] = {};
  uint32_t out[4] = {};
  float (*convert)(uint16_t) = nullptr;
  int mask = 0;
};

class Thread {
 public:
  Thread(Block& block, unsigned number, Index block_index);

  Index index, block_index;

  void barrier();
  uint32_t load_pair(const void* from);
  void store_pair(void* to, uint32_t pair);
  void copy_async(uint32_t shared, const void* global, bool valid);
  void copy_commit();
  void copy_wait(int pending);
  void load_matrices(uint32_t (&to)[4], uint32_t shared, bool transposed);
  void multiply_add(float (*convert)(uint16_t), float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
  float shuffle_xor(float x, int mask);

 private:
  friend class Block;
  struct Copy {
    uint32_t shared;
    uint8_t bytes[16];
  };

  void wait(State state);
  void together(const char* what);
  std::string name() const { return "thread " + std::to_string(number_); }

  Block& block_;
  unsigned number_;
  State state_ = State::ready;
  ucontext_t context_;
  std::unique_ptr<char[]> stack_;
  std::vector<Copy> open_;                // started, in no group yet
  std::deque<std::vector<Copy>> groups_;  // closed, not yet waited for
  Operands operands_;
};

class Block {
 public:
  Block(unsigned threads, size_t shared_bytes, std::vector<Range> ranges, uint64_t seed)
      : threads_(threads), shared_(shared_bytes), words_(shared_bytes / 4), ranges_(std::move(ranges)), random_(seed) {
    if (threads % 32) throw Trap("a block of " + std::to_string(threads) + " threads is not whole warps");
  }

  // Runs one block of a grid; `kernel` is called by every thread.
  template <typename Kernel>
  void run(Index block_index, Kernel kernel) {
    body_ = [](void* k) { (*static_cast<Kernel*>(k))(); };
    argument_ = &kernel;
    fibers_.clear();
    for (unsigned i = 0; i < threads_; ++i) fibers_.push_back(std::make_unique<Thread>(*this, i, block_index));
    for (std::unique_ptr<Thread>& fiber : fibers_) start(*fiber);
    while (step()) {
    }
    if (!error_.empty()) throw Trap(error_);
  }

  int64_t bank_conflicts = 0;  // extra turns that load_matrices took

 private:
  friend class Thread;

  // Who touched four bytes of shared memory, and after how many barriers. -1: nobody, -2: several.
  struct Word {
    bool written = false, under_way = false;
    int writer = -1, reader = -1;
    int64_t write_time = -1, read_time = -1;
  };

  static void enter() {
    Thread& self = *current();
    Block& block = self.block_;
    try {
      block.body_(block.argument_);
      if (!self.open_.empty()) throw Trap(self.name() + " ends with copies in no group");
    } catch (const Trap& trap) {
      if (block.error_.empty()) block.error_ = trap.what();
    }
    self.state_ = State::done;
    swapcontext(&self.context_, &block.scheduler_);
  }

  void start(Thread& fiber) {
    constexpr size_t kStack = 256 * 1024;
    fiber.stack_.reset(new char[kStack]);
    getcontext(&fiber.context_);
    fiber.context_.uc_stack.ss_sp = fiber.stack_.get();
    fiber.context_.uc_stack.ss_size = kStack;
    fiber.context_.uc_link = nullptr;
    makecontext(&fiber.context_, &Block::enter, 0);
  }

  // Lets one thread go on to where it must wait; false when all have ended or one has failed.
  bool step() {
    std::vector<Thread*> ready;
    unsigned waiting = 0, done = 0;
    for (const std::unique_ptr<Thread>& fiber : fibers_) {
      if (fiber->state_ == State::ready) ready.push_back(fiber.get());
      waiting += fiber->state_ == State::at_barrier;
      done += fiber->state_ == State::done;
    }
    if (!error_.empty() || done == threads_) return false;
    if (ready.empty()) {
      if (waiting != threads_) {
        error_ = std::to_string(waiting) + " threads wait at a barrier, " + std::to_string(done) +
                 " have ended, the others wait for their warp";
        return false;
      }
      ++time_;
      for (const std::unique_ptr<Thread>& fiber : fibers_) fiber->state_ = State::ready;
      return true;
    }
    Thread& next = *ready[random_() % ready.size()];
    current() = &next;
    swapcontext(&scheduler_, &next.context_);
    return true;
  }

  Word* words(const Thread& thread, uint32_t address) {
    if (address % 16) throw Trap(thread.name() + ": shared address " + std::to_string(address) + " is not aligned");
    if (address + 16 > shared_.size()) {
      throw Trap(thread.name() + ": shared address " + std::to_string(address) + " is beyond the " +
                 std::to_string(shared_.size()) + " bytes there are");
    }
    return &words_[address / 4];
  }

  void note_write(const Thread& thread, uint32_t address, bool under_way) {
    Word* word = words(thread, address);
    const int self = static_cast<int>(thread.number_);
    for (int i = 0; i < 4; ++i, ++word) {
      const bool other_wrote = word->write_time == time_ && word->writer != self;
      const bool other_read = word->read_time == time_ && word->reader != self;
      if (other_wrote || other_read) {
        throw Trap("race: " + thread.name() + " writes shared address " + std::to_string(address) + ", which thread " +
                   std::to_string(other_wrote ? word->writer : word->reader) + " touched since the last barrier");
      }
      word->written = true;
      word->under_way = under_way;
      word->writer = self;
      word->write_time = time_;
    }
  }

  const uint8_t* note_read(const Thread& thread, uint32_t address) {
    Word* word = words(thread, address);
    const int self = static_cast<int>(thread.number_);
    for (int i = 0; i < 4; ++i, ++word) {
      const std::string where = thread.name() + " reads shared address " + std::to_string(address);
      if (!word->written) throw Trap(where + ", which nobody has written");
      if (word->under_way) throw Trap(where + ", whose copy nobody has waited for");
      if (word->write_time == time_ && word->writer != self) {
        throw Trap("race: " + where + ", which thread " + std::to_string(word->writer) +
                   " wrote since the last barrier");
      }
      word->reader = word->read_time == time_ && word->reader != self ? -2 : self;
      word->read_time = time_;
    }
    return &shared_[address];
  }

  void check_global(const Thread& thread, const void* address, size_t bytes, bool write) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (at % bytes) throw Trap(thread.name() + ": a global address is not aligned to " + std::to_string(bytes));
    for (const Range& range : ranges_) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(range.begin);
      if (range.writable == write && at >= begin && at + bytes <= begin + range.bytes) return;
    }
    throw Trap(thread.name() + (write ? " writes" : " reads") + " global memory out of bounds");
  }

  void shuffle(Thread* const* lanes);
  void load_matrices(Thread* const* lanes, bool transposed);
  void multiply_add(Thread* const* lanes);

  unsigned threads_;
  std::vector<uint8_t> shared_;
  std::vector<Word> words_;
  std::vector<Range> ranges_;
  std::mt19937_64 random_;
  int64_t time_ = 0;  // barriers so far
  std::vector<std::unique_ptr<Thread>> fibers_;
  ucontext_t scheduler_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::string error_;
};

inline Thread& thread() { return *current(); }

inline Thread::Thread(Block& block, unsigned number, Index where) : block_index(where), block_(block), number_(number) {
  index.x = number;
}

inline void Thread::wait(State state) {
  state_ = state;
  swapcontext(&context_, &block_.scheduler_);
}

inline void Thread::barrier() { wait(State::at_barrier); }

inline uint32_t Thread::load_pair(const void* from) {
  block_.check_global(*this, from, 4, false);
  uint32_t pair;
  std::memcpy(&pair, from, sizeof(pair));
  return pair;
}

inline void Thread::store_pair(void* to, uint32_t pair) {
  block_.check_global(*this, to, 4, true);
  std::memcpy(to, &pair, sizeof(pair));
}

// As late as the rules allow: the bytes are read now, and come when they are waited for.
inline void Thread::copy_async(uint32_t shared, const void* global, bool valid) {
  Copy copy{shared, {}};
  if (valid) {
    block_.check_global(*this, global, 16, false);
    std::memcpy(copy.bytes, global, 16);
  }
  block_.note_write(*this, shared, true);
  open_.push_back(copy);
}

inline void Thread::copy_commit() { groups_.push_back(std::move(open_)), open_.clear(); }

inline void Thread::copy_wait(int pending) {
  for (; static_cast<int>(groups_.size()) > pending; groups_.pop_front()) {
    for (const Copy& copy : groups_.front()) {
      block_.note_write(*this, copy.shared, false);
      std::memcpy(&block_.shared_[copy.shared], copy.bytes, 16);
    }
  }
}

// Waits for the other lanes; the last to come does the work of all.
inline void Thread::together(const char* what) {
  operands_.what = what;
  Thread* lanes[32];
  unsigned here = 1;
  for (unsigned i = 0; i < 32; ++i) {
    lanes[i] = block_.fibers_[number_ / 32 * 32 + i].get();
    here += lanes[i]->state_ == State::in_warp;
  }
  if (here < 32) return wait(State::in_warp);
  for (Thread* lane : lanes) {
    if (std::strcmp(lane->operands_.what, what)) {
      throw Trap("divergence: " + lane->name() + " is at " + lane->operands_.what + ", " + name() + " at " + what);
    }
  }
  if (!std::strcmp(what, "shuffle")) block_.shuffle(lanes);
  if (!std::strcmp(what, "load_matrices")) block_.load_matrices(lanes, false);
  if (!std::strcmp(what, "load_matrices_transposed")) block_.load_matrices(lanes, true);
  if (!std::strcmp(what, "multiply_add")) block_.multiply_add(lanes);
  for (Thread* lane : lanes) lane->state_ = State::ready;
}

inline float Thread::shuffle_xor(float x, int mask) {
  operands_.accumulators[0] = x;
  operands_.mask = mask;
  together("shuffle");
  return operands_.accumulators[1];
}

inline void Block::shuffle(Thread* const* lanes) {
  for (unsigned i = 0; i < 32; ++i) {
    lanes[i]->operands_.accumulators[1] = lanes[i ^ lanes[i]->operands_.mask]->operands_.accumulators[0];
  }
}

inline void Thread::load_matrices(uint32_t (&to)[4], uint32_t shared, bool transposed) {
  operands_.in[0] = shared;
  together(transposed ? "load_matrices_transposed" : "load_matrices");
  std::memcpy(to, operands_.out, sizeof(to));
}

inline void Block::load_matrices(Thread* const* lanes, bool transposed) {
  for (int m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    std::set<uint32_t> lines;
    std::vector<int> turns(8);
    for (int row = 0; row < 8; ++row) {
      const Thread& lane = *lanes[8 * m + row];
      const uint32_t address = lane.operands_.in[0];
      std::memcpy(matrix[row], note_read(lane, address), 16);
      if (lines.insert(address / 16).second && turns[address / 16 % 8]++) ++bank_conflicts;
    }
    for (int i = 0; i < 32; ++i) {
      const int row = i / 4, column = 2 * (i % 4);
      const uint16_t low = transposed ? matrix[column][row] : matrix[row][column];
      const uint16_t high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      lanes[i]->operands_.out[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

inline void Thread::multiply_add(float (*convert)(uint16_t), float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                 uint32_t b1) {
  std::memcpy(operands_.accumulators, c, sizeof(c));
  std::memcpy(operands_.in, a, sizeof(a));
  operands_.in[4] = b0;
  operands_.in[5] = b1;
  operands_.convert = convert;
  together("multiply_add");
  std::memcpy(c, operands_.accumulators, sizeof(c));
}

// mma.m16n8k16; where each element lies is the PTX ISA's table for it.
inline void Block::multiply_add(Thread* const* lanes) {
  float a[16][16], b[16][8];
  for (int i = 0; i < 32; ++i) {
    const Operands& o = lanes[i]->operands_;
    const int group = i / 4, pair = 2 * (i % 4);
    for (int e = 0; e < 2; ++e) {
      const int shift = 16 * e;
      const auto half = [&](int n) { return o.convert(static_cast<uint16_t>(o.in[n] >> shift)); };
      a[group][pair + e] = half(0);
      a[group + 8][pair + e] = half(1);
      a[group][pair + 8 + e] = half(2);
      a[group + 8][pair + 8 + e] = half(3);
      b[pair + e][group] = half(4);
      b[pair + 8 + e][group] = half(5);
    }
  }
  for (int i = 0; i < 32; ++i) {
    for (int e = 0; e < 4; ++e) {
      const int row = i / 4 + 8 * (e / 2), column = 2 * (i % 4) + e % 2;
      double sum = lanes[i]->operands_.accumulators[e];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      lanes[i]->operands_.accumulators[e] = static_cast<float>(sum);
    }
  }
}

}  // namespace emulation
