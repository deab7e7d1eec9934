// The instructions of sm_90, for csrc/device/hopper.cuh: mbarriers, TMA, products of a warpgroup, register counts.
//
// What is asynchronous is made as late, and as awkward, as the rules allow. A copy by TMA spoils its destination at
// once, and its bytes come at a random later time, or when nobody else can go on; only those who waited for the phase
// of the mbarrier that counted them may read them. A product spoils its sums at once, reads its operands now or when it
// is waited for, and until then nobody may write them. Swizzles permute bits of the real address, as the hardware's do,
// so that a wrong one, or a tile or stride where it should not be, gives wrong numbers or a trap.
#pragma once

#include "device/tensor_map.h"
#include "emulation.h"
#include "numbers.h"

namespace emulation {

struct Mbarrier {
  int agent;  // in clocks: its copies
  Thread* maker;
  int count, to_come;
  int64_t bytes = 0;  // expected and not yet there
  uint32_t phase = 0;
  bool fenced = false;
  Clock arrived{}, ended{};  // what those who arrived in this phase knew, and those of the last
  std::vector<std::pair<Thread*, int>> waiting{};

  std::string state(uint32_t address) const {
    return "the mbarrier at " + std::to_string(address) + ", in phase " + std::to_string(phase) + " with " +
           std::to_string(to_come) + " arrivals and " + std::to_string(bytes) + " bytes to come";
  }
};

struct Product {
  uint64_t a, b;
  int columns;
  float (*convert)(uint16_t);
  bool add;
  float* sums;                                    // lane 0's: the name of the accumulators
  bool transposed = false, in_registers = false;  // b; a
  const uint32_t* registers[32] = {};             // by lane, if a is in them; before it is issued, the lane's own
  bool computed = false;
};

// One warp's quarter of its warpgroup's products.
struct ProductQueue {
  struct Sums {
    float* registers[32];
    std::vector<float> values[32];
    int products = 0;  // under way
  };
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::map<float*, Sums> sums;
  bool fenced = false;
  size_t issued = 0;
};

struct Hopper {
  std::map<uint32_t, Mbarrier> mbarriers;
  std::map<unsigned, ProductQueue> queues;             // by warp
  std::map<unsigned, std::vector<Product>> sequences;  // by warpgroup: what all its warps must issue
  int registers = 0, spare = 0;                        // of a thread at the start; of the block, in no warp's hands
  std::map<unsigned, int> held;                        // by warp, if not as at the start
  std::vector<Thread*> short_of;
};

struct Store {
  vitfast::Matrix matrix;
  int row, column;
  uint32_t shared;
};
struct Stores {
  std::vector<Store> open;
  std::deque<std::vector<Store>> groups;
};

inline std::string left_by(Thread& self);

// Made when it is first asked for.
inline Hopper& hopper_of(Block& block) {
  if (!block.hopper) {
    block.hopper = std::make_shared<Hopper>();
    block.left_by = &left_by;
  }
  return *block.hopper;
}

// What a thread has left undone at its end.
inline std::string left_by(Thread& self) {
  if (self.stores && (!self.stores->open.empty() || !self.stores->groups.empty())) {
    return "stores whose reads nobody has waited for";
  }
  const ProductQueue& queue = hopper_of(self.block).queues[self.number / 32];
  if (!queue.open.empty() || !queue.groups.empty()) return "products nobody has waited for";
  return "";
}

// Fences.
inline void async_fence() {
  Thread& self = thread();
  for (const auto& [address, bytes] : self.unfenced) {
    Word* word = self.block.words(self, address, bytes);
    for (uint32_t i = 0; i < bytes; i += 4, ++word) word->fenced |= word->writer.agent == self.agent;
  }
  self.unfenced.clear();
  for (auto& [address, barrier] : hopper_of(self.block).mbarriers) barrier.fenced |= barrier.maker == &self;
}

// TMA and wgmma read shared memory: `all` are the threads that stand behind it.
inline void note_async_read(Block& block, Thread* const* all, int count, uint32_t address, uint32_t bytes) {
  Word* word = block.words(**all, address, bytes);
  Epoch last;  // neighbours have mostly one writer
  for (uint32_t i = 0; i < bytes; i += 4, ++word) {
    const auto trap = [&](const std::string& why) {
      throw Trap((*all)->name() + " has shared address " + std::to_string(address + i) + " read, " + why);
    };
    if (word->barrier) trap("which holds an mbarrier");
    if (!word->written) trap("which nobody has written");
    if (word->under_way) trap("whose copy nobody has waited for");
    if (!word->fenced) trap("which " + block.name(word->writer) + " wrote with no async_fence after it");
    if (word->writer.agent != last.agent || word->writer.time != last.time) {
      last = word->writer;
      for (int t = 0; t < count; ++t) {
        if (!all[t]->knows(last)) trap("race: which " + block.name(last) + " wrote with no barrier between");
      }
    }
    ++word->in_use;
  }
}
inline void end_async_read(Block& block, Thread& reader, uint32_t address, uint32_t bytes) {
  Word* word = block.words(reader, address, bytes);
  for (uint32_t i = 0; i < bytes; i += 4, ++word) {
    --word->in_use;
    auto& readers = word->readers;
    const auto known = [&](const Epoch& epoch) { return reader.knows(epoch); };
    readers.erase(std::remove_if(readers.begin(), readers.end(), known), readers.end());
    readers.push_back(reader.now());
  }
}

// Addresses in a cluster have the block's rank, and one, above those of a block, whose own are addresses there too.
constexpr int kRankShift = 24;
inline uint32_t address_in_cluster(uint32_t address, int rank) {
  if (rank < 0 || rank >= static_cast<int>(thread().block.cluster.size())) {
    throw Trap(thread().name() + ": there is no block " + std::to_string(rank) + " in the cluster");
  }
  return address | static_cast<uint32_t>(rank + 1) << kRankShift;
}
inline Block& block_at(uint32_t address) {
  const uint32_t rank = address >> kRankShift;
  return rank ? *thread().block.cluster[rank - 1] : thread().block;
}

// mbarriers.
inline Mbarrier& mbarrier_at(Block& block, uint32_t address) {
  std::map<uint32_t, Mbarrier>& all = hopper_of(block).mbarriers;
  const auto found = all.find(address);
  if (found == all.end()) throw Trap(thread().name() + ": there is no mbarrier at " + std::to_string(address));
  return found->second;
}

inline void mbarrier_init(uint32_t address, int count) {
  Thread& self = thread();
  Block& block = self.block;
  block.note_write(self, address, 8, false);
  if (hopper_of(block).mbarriers.size() == Block::kMbarriers) throw Trap("too many mbarriers");
  const int agent = block.first_agent + static_cast<int>(block.fibers.size() + hopper_of(block).mbarriers.size());
  Mbarrier barrier{agent, &self, count, count};
  barrier.arrived = barrier.ended = Clock(self.clock.size());
  hopper_of(block).mbarriers.emplace(address, barrier);
  for (uint32_t i = 0; i < 8; i += 4) block.words(self, address + i, 4)->barrier = true;
}

// The mbarrier's words as data: has this thread met its maker?
inline void check_made(Thread& self, Block& block, uint32_t address) {
  if (!self.knows(block.words(self, address, 8)->writer)) {
    throw Trap("race: " + self.name() + " uses an mbarrier with no barrier since it was made");
  }
}

inline void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.to_come < 0) throw Trap("more arrivals at an mbarrier than its " + std::to_string(barrier.count));
  if (barrier.to_come || barrier.bytes) return;
  ++barrier.phase;
  barrier.to_come = barrier.count;
  barrier.arrived[barrier.agent] = barrier.phase;
  barrier.ended = barrier.arrived;
  std::vector<std::pair<Thread*, int>> still;
  for (const auto& [waiter, parity] : barrier.waiting) {
    if (static_cast<int>(barrier.phase % 2) == parity) {
      still.emplace_back(waiter, parity);
    } else {
      join(waiter->clock, barrier.ended);
      waiter->state = State::ready;
    }
  }
  barrier.waiting = still;
}

// `bytes` is 0 if the thread expects none.
inline void mbarrier_arrive(Block& block, uint32_t address, int bytes) {
  Thread& self = thread();
  Mbarrier& barrier = mbarrier_at(block, address);
  check_made(self, block, address);
  block.check_reachable(self);
  if (&block != &self.block) block.note_reached(self.now());
  barrier.bytes += bytes;
  --barrier.to_come;
  join(barrier.arrived, self.clock);
  ++self.time();
  end_phase_if_complete(barrier);
}

inline void mbarrier_arrive(uint32_t address, int bytes) { mbarrier_arrive(thread().block, address, bytes); }
inline void mbarrier_arrive_in_cluster(uint32_t address) {
  mbarrier_arrive(block_at(address), address & ((1u << kRankShift) - 1), 0);
}

inline void mbarrier_wait(uint32_t address, int parity) {
  Thread& self = thread();
  Mbarrier& barrier = mbarrier_at(self.block, address);
  check_made(self, self.block, address);
  if (static_cast<int>(barrier.phase % 2) != parity) return join(self.clock, barrier.ended);
  barrier.waiting.emplace_back(&self, parity);
  self.wait(
      [&barrier, address, parity] { return "for parity " + std::to_string(parity) + " of " + barrier.state(address); });
}

// TMA. What is in a TensorMap here: the Matrix or Heads, and at the end how many axes there are.
template <typename What>
vitfast::TensorMap as_map(const What& what, uint64_t axes) {
  vitfast::TensorMap map{};
  static_assert(sizeof(what) < sizeof(map));
  std::memcpy(map.opaque, &what, sizeof(what));
  map.opaque[15] = axes;
  return map;
}
template <typename What>
What of_map(const vitfast::TensorMap& map, uint64_t axes) {
  if (map.opaque[15] != axes) throw Trap(thread().name() + ": the map is not of " + std::to_string(axes) + " axes");
  What what;
  std::memcpy(&what, map.opaque, sizeof(what));
  return what;
}

inline vitfast::TensorMap encode(const vitfast::Matrix& m) {
  const auto check = [](bool good, const char* what) {
    if (!good) throw Trap(std::string("tensor map: ") + what);
  };
  check(reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 8 == 0, "rows are not aligned to 16 bytes");
  check(m.rows >= 1 && m.columns >= 1 && m.stride >= m.columns, "the matrix has no rows, columns or stride");
  check(m.box_rows >= 1 && m.box_rows <= 256, "a box has 1 to 256 rows");
  check(m.box_columns % 8 == 0 && m.box_columns >= 8, "a box has whole chunks of 16 bytes");
  check(m.box_columns <= 64, "the rows of a swizzled box are at most 128 bytes");
  return as_map(m, 2);
}

// The matrix of one head of one image.
inline vitfast::Matrix slice(const vitfast::Heads& h, int image, int head) {
  if (image < 0 || image >= h.images || head < 0 || head >= h.heads) throw Trap("there is no such image or head");
  const char* data = static_cast<const char*>(h.data) + 2 * (image * h.image_stride + head * h.head_stride);
  return {data, h.rows, h.columns, h.row_stride, h.box_rows, h.box_columns};
}
inline vitfast::TensorMap encode_heads(const vitfast::Heads& h) {
  if (h.images < 1 || h.heads < 1) throw Trap("tensor map: there are no images or heads");
  for (int64_t stride : {h.image_stride, h.row_stride, h.head_stride}) {
    if (stride % 8 || stride < h.columns || stride >= int64_t{1} << 39) throw Trap("tensor map: not a stride for TMA");
  }
  encode(slice(h, 0, 0));
  return as_map(h, 4);
}

// Swizzle<bits, 4, 3> of CuTe: bits 4 .. of an address, xor bits 7 ... 128-byte swizzle: 3 bits, 64: 2, 32: 1.
inline uint32_t permuted(uint32_t address, int bits) {
  const uint32_t mask = (1u << bits) - 1;
  return address ^ (address >> 7 & mask) << 4;
}

// Calls f(shared, global or null, bytes within the matrix) for every 16 bytes of a box; null is beyond the matrix.
template <typename F>
void for_box(const vitfast::Matrix& m, int64_t row, int64_t column, uint32_t shared, F f) {
  for (int r = 0; r < m.box_rows; ++r) {
    for (int c = 0; c < m.box_columns; c += 8) {
      const uint32_t to = permuted(shared + 2 * (r * m.box_columns + c), 3);
      const bool inside = row + r >= 0 && row + r < m.rows && column + c >= 0 && column + c < m.columns;
      const char* from = static_cast<const char*>(m.data) + 2 * ((row + r) * m.stride + column + c);
      f(to, inside ? from : nullptr,
        inside ? 2 * static_cast<size_t>(std::min<int64_t>(8, m.columns - column - c)) : 0);
    }
  }
}

inline void check_box(Thread& self, Block& block, const vitfast::Matrix& m, int column, uint32_t shared) {
  if (shared % 128) throw Trap(self.name() + ": a box in shared memory is not aligned to 128 bytes");
  if (column % 8) throw Trap(self.name() + ": a box that does not begin at a chunk of 16 bytes is not emulated");
  block.words(self, shared, 2 * m.box_rows * m.box_columns);
}

inline void tile_load(Block& block, uint32_t shared, const vitfast::Matrix& m, int row, int column, uint32_t address) {
  Thread& self = thread();
  Mbarrier& barrier = mbarrier_at(block, address);
  check_box(self, block, m, column, shared);
  check_made(self, block, address);
  block.check_reachable(self);
  if (!barrier.fenced) throw Trap(self.name() + ": TMA has not seen the mbarrier made: there was no async_fence");
  for_box(m, row, column, shared, [&](uint32_t to, const char* from, size_t bytes) {
    if (from) block.check_global(self, from, bytes, 2, false);
    block.note_write(self, to, 16, true);
    for (uint32_t i = 0; i < 16; i += 4) {
      Word& word = *block.words(self, to + i, 4);
      word.fenced = true;
      word.writer = {barrier.agent, UINT32_MAX};  // nobody knows of it yet
    }
    std::memset(&block.shared[to], 0xff, 16);  // NaN in bf16, fp16 and e4m3
  });
  block.under_way.push_back([&block, &self, &barrier, m, row, column, shared] {
    for_box(m, row, column, shared, [&](uint32_t to, const char* from, size_t bytes) {
      std::memset(&block.shared[to], 0, 16);
      if (from) std::memcpy(&block.shared[to], from, bytes);
      for (uint32_t i = 0; i < 16; i += 4) {
        Word& word = *block.words(self, to + i, 4);
        word.under_way = false;
        word.writer.time = barrier.phase + 1;  // whoever waits for the end of this phase
      }
    });
    if (&block != &self.block) block.note_reached({barrier.agent, barrier.phase + 1});
    barrier.bytes -= 2 * m.box_rows * m.box_columns;
    end_phase_if_complete(barrier);
  });
}

inline void tile_load(uint32_t shared, const vitfast::TensorMap& map, int row, int column, uint32_t address) {
  tile_load(thread().block, shared, of_map<vitfast::Matrix>(map, 2), row, column, address);
}
inline void tile_load_multicast(uint32_t shared, const vitfast::TensorMap& map, int row, int column, uint32_t address,
                                uint16_t blocks) {
  const std::vector<Block*>& cluster = thread().block.cluster;
  if (blocks >> cluster.size()) throw Trap(thread().name() + ": a multicast to blocks that the cluster has not");
  for (size_t rank = 0; rank < cluster.size(); ++rank) {
    if (blocks >> rank & 1) {
      tile_load(*cluster[rank], shared, of_map<vitfast::Matrix>(map, 2), row, column, address);
    }
  }
}
inline void tile_load(uint32_t shared, const vitfast::TensorMap& map, int image, int row, int head, int column,
                      uint32_t address) {
  tile_load(thread().block, shared, slice(of_map<vitfast::Heads>(map, 4), image, head), row, column, address);
}

inline void tile_store(const vitfast::Matrix& m, int row, int column, uint32_t shared) {
  Thread& self = thread();
  check_box(self, self.block, m, column, shared);
  Thread* const me = &self;
  for_box(m, row, column, shared, [&](uint32_t from, const char* to, size_t bytes) {
    note_async_read(self.block, &me, 1, from, 16);
    if (to) self.block.check_global(self, to, bytes, 2, true);
  });
  if (!self.stores) self.stores.reset(new Stores);
  self.stores->open.push_back({m, row, column, shared});
}
inline void tile_store(const vitfast::TensorMap& map, int row, int column, uint32_t shared) {
  tile_store(of_map<vitfast::Matrix>(map, 2), row, column, shared);
}
inline void tile_store(const vitfast::TensorMap& map, int image, int row, int head, int column, uint32_t shared) {
  tile_store(slice(of_map<vitfast::Heads>(map, 4), image, head), row, column, shared);
}

inline void store_commit() {
  Thread& self = thread();
  if (!self.stores) self.stores.reset(new Stores);
  self.stores->groups.push_back(std::move(self.stores->open));
  self.stores->open.clear();
}

inline void store_wait_read(int pending) {
  Thread& self = thread();
  if (!self.stores) return;
  auto& groups = self.stores->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const Store& store : groups.front()) {
      for_box(store.matrix, store.row, store.column, store.shared, [&](uint32_t from, const char* to, size_t n) {
        if (to) std::memcpy(const_cast<char*>(to), &self.block.shared[from], n);
        end_async_read(self.block, self, from, 16);
      });
    }
  }
}

// setmaxnreg: registers go from the block's spare ones to a warp and back.
inline void set_registers(int registers, bool more) {
  Thread& self = thread();
  Hopper& hopper = hopper_of(self.block);
  if (self.number % 32 == 0) {
    const auto known = hopper.held.find(self.number / 32);
    const int held = known == hopper.held.end() ? hopper.registers : known->second;
    if (registers < 24 || registers > 256 || registers % 8 || (more ? registers < held : registers > held)) {
      throw Trap(self.name() + ": setmaxnreg from " + std::to_string(held) + " to " + std::to_string(registers));
    }
    const int needed = 32 * (registers - held);
    while (hopper.spare < needed) {
      hopper.short_of.push_back(&self);
      self.wait([&hopper, needed] {
        return "for " + std::to_string(needed) + " registers where " + std::to_string(hopper.spare) + " are spare";
      });
    }
    hopper.spare -= needed;
    hopper.held[self.number / 32] = registers;
    for (Thread* waiting : hopper.short_of) waiting->state = State::ready;
    hopper.short_of.clear();
  }
  self.together("set_registers", nullptr, [](Thread* const*) {});
}

}  // namespace emulation

#include "wgmma.h"
