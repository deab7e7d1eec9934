// A thread block on the CPU, or a cluster of them, for csrc/device/atoms.cuh: each thread is a fiber, and the scheduler
// picks the next one at random, so that code which needs a barrier and has none meets every order sooner or later.
// Beside that, every word of shared memory remembers who wrote and read it, and threads know by vector clocks (Lamport
// 1978, Mattern 1989; the words as in FastTrack, Flanagan and Freund 2009) what happened before: a race shows in any
// order.
//
// It lies with the tests and not in csrc: no build of the package needs it, and it may be as strict as it likes.
// What is wrong with a kernel is thrown as Trap: reads of shared memory that nobody wrote or whose copy is still
// under way, races, addresses out of bounds or not aligned, warps that part before an instruction of the whole warp,
// threads that wait for others that never come, blocks that end while others of their cluster still reach into them.
//
// This file has threads, memory and barriers; warp.h the instructions of a warp, hopper.h those of sm_90.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
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

class Block;
class Thread;
inline Thread*& current() {
  static Thread* running = nullptr;
  return running;
}

// What an agent, a thread or an mbarrier's copies, did at a time of its own. Agents are numbered through a cluster.
struct Epoch {
  int agent = -1;
  uint32_t time = 0;
};
// The last time of every agent that is known to have passed.
using Clock = std::vector<uint32_t>;
inline void join(Clock& clock, const Clock& other) {
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

// The sm_90 side of a block and of a thread, in hopper.h.
struct Hopper;
struct Stores;

enum class State { ready, waiting, in_warp, done };

class Thread {
 public:
  Thread(Block& block, unsigned number, Index block_index, unsigned grid_size);

  Index index, block_index;
  unsigned grid_size;

  void barrier(int id = 0, int threads = 0);
  void cluster_barrier();
  uint32_t load_pair(const void* from);
  void load_floats(float (&to)[2], const void* from);
  void store_pair(void* to, uint32_t pair);
  float load_float(const void* from);
  void store_float(void* to, float x);
  void store_floats(void* to, float first, float second);
  uint32_t load_shared_pair(uint32_t shared);
  void store_shared_pair(uint32_t shared, uint32_t pair);
  void copy_async(uint32_t shared, const void* global, bool valid);
  void copy_commit();
  void copy_wait(int pending);
  void load_matrices(uint32_t (&to)[4], uint32_t shared, bool transposed);
  void multiply_add(float (*convert)(uint16_t), float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
  template <typename T>
  T shuffle_xor(T x, int mask);

  // For the instructions: goes on when somebody sets the state to ready.
  void wait(std::function<std::string()> what_for);
  // Waits for the other lanes; the last to come does `work` on what all of them brought.
  void together(const char* what, void* operands, void (*work)(Thread* const* lanes));
  std::string name() const;
  uint32_t& time() { return clock[agent]; }
  Epoch now() { return {agent, time()}; }
  bool knows(const Epoch& epoch) const { return epoch.agent < 0 || clock[epoch.agent] >= epoch.time; }

  Block& block;
  const unsigned number;
  const int agent;
  State state = State::ready;
  Clock clock;
  void* operands = nullptr;
  unsigned accesses = 0;                                // to shared memory
  std::vector<std::pair<uint32_t, uint32_t>> unfenced;  // what it wrote since its last async_fence: address, bytes
  std::shared_ptr<Stores> stores;

 private:
  friend class Block;
  struct Copy {
    uint32_t shared;
    uint8_t bytes[16];
  };

  ucontext_t context_;
  std::unique_ptr<char[]> stack_;
  std::vector<Copy> open_;                // started, in no group yet
  std::deque<std::vector<Copy>> groups_;  // closed, not yet waited for
  std::function<std::string()> waits_for_;
  const char* in_warp_ = nullptr;
};

// Four bytes of shared memory.
struct Word {
  bool written = false, under_way = false;  // under way: a copy will write, or rewrite, it
  bool fenced = true;                       // TMA and wgmma see what a thread wrote
  bool barrier = false;                     // holds an mbarrier
  int in_use = 0;                           // products and stores that will still read it
  Epoch writer;
  std::vector<Epoch> readers;  // since it was written
};

class Block {
 public:
  static constexpr int kMbarriers = 64;

  // `begin`: where the dynamic shared memory begins. A GPU promises multiples of 16.
  Block(unsigned threads, size_t shared_bytes, std::vector<Range> ranges, uint64_t seed, uint32_t begin = 0);

  // Runs one block of a grid; `kernel` is called by every thread.
  template <typename Kernel>
  void run(Index block_index, Kernel kernel, unsigned grid_size = 1) {
    run_cluster({this}, block_index, kernel, grid_size);
  }

  // Runs blocks of one size as a cluster; `first_index` is the first one's, the others follow along x.
  template <typename Kernel>
  static void run_cluster(const std::vector<Block*>& blocks, Index first_index, Kernel kernel, unsigned grid_size) {
    for (size_t rank = 0; rank < blocks.size(); ++rank) {
      Block& block = *blocks[rank];
      block.cluster = blocks;
      block.first_agent = static_cast<int>(rank) * block.agents();
      block.body_ = [](void* k) { (*static_cast<Kernel*>(k))(); };
      block.argument_ = &kernel;
      block.fibers.clear();
      Index index = first_index;
      index.x += static_cast<unsigned>(rank);
      for (unsigned i = 0; i < block.threads_; ++i) {
        block.fibers.push_back(std::make_unique<Thread>(block, i, index, grid_size));
      }
      for (std::unique_ptr<Thread>& fiber : block.fibers) block.start(*fiber);
    }
    while (step(blocks)) {
    }
    for (Block* block : blocks) {
      if (!block->error_.empty()) throw Trap(block->error_);
    }
  }

  int agents() const { return static_cast<int>(threads_) + kMbarriers; }
  int rank() const { return first_agent / agents(); }

  int64_t bank_conflicts = 0;  // extra turns that accesses to shared memory took

  // For the instructions.
  Word* words(const Thread& thread, uint32_t address, uint32_t bytes);
  void note_write(Thread& thread, uint32_t address, uint32_t bytes, bool under_way);
  void note_read(Thread& thread, uint32_t address, uint32_t bytes);
  void check_global(const Thread& thread, const void* address, size_t bytes, size_t aligned, bool write) const;
  void count_conflicts(Thread& thread, uint32_t address);
  std::string name(const Epoch& epoch) const;
  void check_reachable(const Thread& thread) const;
  void note_reached(const Epoch& from);

  const uint32_t begin;
  std::vector<uint8_t> shared;
  std::vector<std::unique_ptr<Thread>> fibers;
  std::mt19937_64 random;
  std::vector<std::function<void()>> under_way;  // what will happen, at any time and in any order
  std::vector<Block*> cluster;                   // by rank, this block among them
  int first_agent = 0;
  std::shared_ptr<Hopper> hopper;
  std::string (*left_by)(Thread&) = nullptr;  // what a thread has not waited for at its end

 private:
  friend class Thread;
  struct Gathering {
    unsigned expected = 0;
    std::vector<Thread*> here;
  };

  static void enter();
  void start(Thread& fiber);
  static bool step(const std::vector<Block*>& blocks);
  static std::string deadlock(const std::vector<Block*>& blocks);
  void end();

  unsigned threads_;
  std::vector<Word> words_;
  std::vector<Range> ranges_;
  std::map<int, Gathering> barriers_;
  std::vector<Thread*> at_cluster_barrier_;  // of all blocks; the first block's counts
  std::vector<Epoch> reached_;               // what threads and copies of other blocks last did here
  bool ended_ = false;
  std::map<std::pair<unsigned, unsigned>, std::vector<uint32_t>> accesses_;
  ucontext_t scheduler_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::string error_;
};

inline Thread& thread() { return *current(); }

inline Block::Block(unsigned threads, size_t shared_bytes, std::vector<Range> ranges, uint64_t seed, uint32_t first)
    : begin(first),
      shared(first + shared_bytes),
      random(seed),
      threads_(threads),
      words_((first + shared_bytes) / 4),
      ranges_(std::move(ranges)) {
  if (threads % 32) throw Trap("a block of " + std::to_string(threads) + " threads is not whole warps");
}

inline Thread::Thread(Block& whose, unsigned i, Index where, unsigned grid)
    : block_index(where),
      grid_size(grid),
      block(whose),
      number(i),
      agent(whose.first_agent + static_cast<int>(i)),
      clock(whose.cluster.size() * static_cast<size_t>(whose.agents())) {
  index.x = number;
  time() = 1;
}

inline std::string Thread::name() const { return block.name({agent, 0}); }

inline void Block::enter() {
  Thread& self = *current();
  Block& block = self.block;
  try {
    block.body_(block.argument_);
    if (!self.open_.empty()) throw Trap(self.name() + " ends with copies in no group");
    const std::string left = block.left_by ? block.left_by(self) : "";
    if (!left.empty()) throw Trap(self.name() + " ends with " + left);
  } catch (const Trap& trap) {
    if (block.error_.empty()) block.error_ = trap.what();
  }
  self.state = State::done;
  swapcontext(&self.context_, &block.scheduler_);
}

inline void Block::start(Thread& fiber) {
  constexpr size_t kStack = 256 * 1024;
  fiber.stack_.reset(new char[kStack]);
  getcontext(&fiber.context_);
  fiber.context_.uc_stack.ss_sp = fiber.stack_.get();
  fiber.context_.uc_stack.ss_size = kStack;
  fiber.context_.uc_link = nullptr;
  makecontext(&fiber.context_, &Block::enter, 0);
}

// Lets one thread go on to where it must wait, or something under way happen; false when all is over or has failed.
inline bool Block::step(const std::vector<Block*>& blocks) {
  Block& first = *blocks[0];
  std::vector<Thread*> ready;
  std::vector<Block*> awaiting;  // once for each thing under way
  bool over = true;
  for (Block* block : blocks) {
    unsigned done = 0;
    for (const std::unique_ptr<Thread>& fiber : block->fibers) {
      if (fiber->state == State::ready) ready.push_back(fiber.get());
      done += fiber->state == State::done;
    }
    if (done == block->threads_ && !block->ended_) block->end();
    if (!block->error_.empty()) return false;
    over &= block->ended_;
    awaiting.insert(awaiting.end(), block->under_way.size(), block);
  }
  if (over) return false;
  if (!awaiting.empty() && (ready.empty() || first.random() % 64 == 0)) {
    std::vector<std::function<void()>>& some = awaiting[first.random() % awaiting.size()]->under_way;
    std::swap(some[first.random() % some.size()], some.back());
    const std::function<void()> happens = std::move(some.back());
    some.pop_back();
    happens();
    return true;
  }
  if (ready.empty()) {
    first.error_ = deadlock(blocks);
    return false;
  }
  Thread& next = *ready[first.random() % ready.size()];
  current() = &next;
  swapcontext(&next.block.scheduler_, &next.context_);
  return true;
}

// All threads have ended, and with them the block's shared memory.
inline void Block::end() {
  ended_ = true;
  if (!under_way.empty()) error_ = "the block ends with copies under way";
  Clock known(fibers[0]->clock.size());
  for (const std::unique_ptr<Thread>& fiber : fibers) join(known, fiber->clock);
  for (const Epoch& reached : reached_) {
    if (known[reached.agent] < reached.time && error_.empty()) {
      error_ = "a block ends not knowing that " + name(reached) + " is through with it";
    }
  }
}

// For what a thread, of this or another block of the cluster, does here; and, if it was of another, when.
inline void Block::check_reachable(const Thread& thread) const {
  if (ended_) throw Trap(thread.name() + " reaches into a block that has ended");
}
inline void Block::note_reached(const Epoch& from) {
  const auto same = [&](const Epoch& epoch) { return epoch.agent == from.agent; };
  reached_.erase(std::remove_if(reached_.begin(), reached_.end(), same), reached_.end());
  reached_.push_back(from);
}

inline std::string Block::deadlock(const std::vector<Block*>& blocks) {
  std::map<std::string, int> waiting;
  int done = 0;
  for (const Block* block : blocks) {
    for (const std::unique_ptr<Thread>& fiber : block->fibers) {
      if (fiber->state == State::waiting) ++waiting[fiber->waits_for_()];
      if (fiber->state == State::in_warp) ++waiting[std::string("for their warp, at ") + fiber->in_warp_];
      done += fiber->state == State::done;
    }
  }
  std::string text = "deadlock: ";
  for (const auto& [what_for, count] : waiting) text += std::to_string(count) + " threads wait " + what_for + ", ";
  return text + std::to_string(done) + " have ended";
}

inline Word* Block::words(const Thread& thread, uint32_t address, uint32_t bytes) {
  const auto trap = [&](const std::string& why) {
    throw Trap(thread.name() + ": shared address " + std::to_string(address) + " is " + why);
  };
  if (address % std::min(bytes, 16u)) trap("not aligned");
  if (address < begin || address + bytes > shared.size()) {
    trap("beyond the " + std::to_string(shared.size() - begin) + " bytes there are");
  }
  return &words_[address / 4];
}

inline std::string Block::name(const Epoch& epoch) const {
  const int number = epoch.agent % agents(), rank = epoch.agent / agents();
  if (number >= static_cast<int>(threads_)) return "a copy";
  return "thread " + std::to_string(number) + (cluster.size() > 1 ? " of block " + std::to_string(rank) : "");
}

inline void Block::note_write(Thread& thread, uint32_t address, uint32_t bytes, bool is_under_way) {
  Word* word = words(thread, address, bytes);
  for (uint32_t i = 0; i < bytes; i += 4, ++word) {
    const auto trap = [&](const std::string& why) {
      throw Trap("race: " + thread.name() + " writes shared address " + std::to_string(address + i) + ", which " + why);
    };
    if (word->barrier) trap("holds an mbarrier");
    if (word->in_use) trap("a product or store under way still reads");
    if (!thread.knows(word->writer)) trap(name(word->writer) + " touched with no barrier between");
    for (const Epoch& reader : word->readers) {
      if (!thread.knows(reader)) trap(name(reader) + " touched with no barrier between");
    }
    word->written = true;
    word->under_way = is_under_way;
    word->fenced = false;
    word->writer = thread.now();
    word->readers.clear();
  }
  thread.unfenced.emplace_back(address, bytes);
}

inline void Block::note_read(Thread& thread, uint32_t address, uint32_t bytes) {
  Word* word = words(thread, address, bytes);
  for (uint32_t i = 0; i < bytes; i += 4, ++word) {
    const auto trap = [&](const std::string& why) {
      throw Trap(thread.name() + " reads shared address " + std::to_string(address + i) + ", " + why);
    };
    if (word->barrier) trap("which holds an mbarrier");
    if (!word->written) trap("which nobody has written");
    if (word->under_way) trap("whose copy nobody has waited for");
    if (!thread.knows(word->writer)) trap("race: which " + name(word->writer) + " wrote with no barrier between");
    auto& readers = word->readers;
    const auto known = [&](const Epoch& reader) { return thread.knows(reader); };
    readers.erase(std::remove_if(readers.begin(), readers.end(), known), readers.end());
    readers.push_back(thread.now());
  }
}

inline void Block::check_global(const Thread& thread, const void* address, size_t bytes, size_t aligned,
                                bool write) const {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at % aligned) throw Trap(thread.name() + ": a global address is not aligned to " + std::to_string(aligned));
  for (const Range& range : ranges_) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(range.begin);
    if (range.writable == write && at >= first && at + bytes <= first + range.bytes) return;
  }
  throw Trap(thread.name() + (write ? " writes" : " reads") + " global memory out of bounds");
}

inline void Thread::wait(std::function<std::string()> what_for) {
  waits_for_ = std::move(what_for);
  state = State::waiting;
  swapcontext(&context_, &block.scheduler_);
}

// Number 0, of no given size, is for the whole block.
inline void Thread::barrier(int id, int threads) {
  Block::Gathering& all = block.barriers_[id];
  const unsigned expected = threads ? threads : block.threads_;
  if (expected % 32 || expected > block.threads_) throw Trap(name() + ": a barrier of " + std::to_string(expected));
  if (!all.here.empty() && all.expected != expected) {
    throw Trap(name() + " is at barrier " + std::to_string(id) + " of " + std::to_string(expected) +
               " threads, others of " + std::to_string(all.expected));
  }
  all.expected = expected;
  all.here.push_back(this);
  if (all.here.size() < expected) {
    return wait([id] { return id ? "at barrier " + std::to_string(id) : "at a barrier"; });
  }
  Clock joined(clock.size());
  for (const Thread* other : all.here) join(joined, other->clock);
  for (Thread* other : all.here) {
    other->clock = joined;
    ++other->time();
    other->state = State::ready;
  }
  all.here.clear();
}

// Of all threads of the cluster's blocks: none may end before.
inline void Thread::cluster_barrier() {
  const std::vector<Block*>& blocks = block.cluster;
  std::vector<Thread*>& here = blocks[0]->at_cluster_barrier_;
  here.push_back(this);
  if (here.size() < blocks.size() * block.threads_) return wait([] { return "at the cluster's barrier"; });
  Clock joined(clock.size());
  for (const Thread* other : here) join(joined, other->clock);
  for (Thread* other : here) {
    other->clock = joined;
    ++other->time();
    other->state = State::ready;
  }
  here.clear();
}

inline void Thread::together(const char* what, void* brought, void (*work)(Thread* const*)) {
  in_warp_ = what;
  operands = brought;
  Thread* lanes[32];
  unsigned here = 1;
  for (unsigned i = 0; i < 32; ++i) {
    lanes[i] = block.fibers[number / 32 * 32 + i].get();
    here += lanes[i]->state == State::in_warp;
  }
  if (here < 32) {
    state = State::in_warp;
    swapcontext(&context_, &block.scheduler_);
    return;
  }
  for (Thread* lane : lanes) {
    if (std::strcmp(lane->in_warp_, what)) {
      throw Trap("divergence: " + lane->name() + " is at " + lane->in_warp_ + ", " + name() + " at " + what);
    }
  }
  work(lanes);
  for (Thread* lane : lanes) lane->state = State::ready;
}

inline uint32_t Thread::load_pair(const void* from) {
  block.check_global(*this, from, 4, 4, false);
  uint32_t pair;
  std::memcpy(&pair, from, sizeof(pair));
  return pair;
}

inline void Thread::load_floats(float (&to)[2], const void* from) {
  block.check_global(*this, from, 8, 8, false);
  std::memcpy(to, from, sizeof(to));
}

inline void Thread::store_pair(void* to, uint32_t pair) {
  block.check_global(*this, to, 4, 4, true);
  std::memcpy(to, &pair, sizeof(pair));
}

inline float Thread::load_float(const void* from) {
  block.check_global(*this, from, 4, 4, false);
  float x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline void Thread::store_float(void* to, float x) {
  block.check_global(*this, to, 4, 4, true);
  std::memcpy(to, &x, sizeof(x));
}

inline void Thread::store_floats(void* to, float first, float second) {
  block.check_global(*this, to, 8, 8, true);
  const float both[] = {first, second};
  std::memcpy(to, both, sizeof(both));
}

}  // namespace emulation

#include "warp.h"
