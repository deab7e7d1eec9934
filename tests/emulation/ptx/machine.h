// A thread block that runs PTX, instruction by instruction: registers, warps, shared and global memory.
//
// A warp runs an instruction for its active lanes at once, so that a register is an array of 32 and most instructions
// are a loop the compiler vectorises. Where lanes part, the group of lanes with the lowest address goes first, and an
// instruction of the whole warp waits until all of its lanes are there: they meet again where the code lets them.
//
// As in ../emulation.h, what is wrong with a kernel is a Trap, whatever order the warps ran in: every unit of shared
// memory remembers who wrote and read it, and vector clocks say what happened before. The clocks are those of warps;
// lanes of one warp know of each other's accesses only after a barrier of the warp or of the block.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../wgmma.h"

namespace ptx {

using emulation::Trap;
using Lanes = uint32_t;  // a bit for each
constexpr int kLanes = 32;
constexpr Lanes kAll = ~0u;
constexpr int kAllOf = 255;             // "lane" of what a warp did or must know as a whole
constexpr uint32_t kSharedBase = 1024;  // the system's own first; also keeps address 0 from being one

inline std::string number(int64_t x) { return std::to_string(x); }

struct Instruction {
  int32_t op, guard, first, line;  // guard: a predicate's register, -1 without
  bool negated;
};

struct Program {
  std::vector<Instruction> code;
  std::vector<int32_t> operands;
  std::vector<uint8_t> is_register;  // of each operand: an offset or a label could look like one
  std::vector<uint8_t> constants;    // of each, 32 times: 64 bits, 32, 16
  int32_t register_bytes = 0, warps = 0, unit = 4, global_unit = 4;
  uint32_t shared_bytes = 0;
  std::vector<int32_t> special;  // registers of tid.x, laneid, ctaid.x y z, nctaid.x y z, ntid.x; -1 where unused
};
constexpr int kConstantBytes = kLanes * (8 + 4 + 2);

// What an agent did at a time of its own: a warp's lane, or (lane unused) the copies that an mbarrier counted.
struct Epoch {
  int16_t agent = -1;
  uint8_t lane = 0;
  uint32_t time = 0;
};
// Times of every agent; what lies before them is known.
struct Clock {
  std::vector<uint32_t> times;
  uint32_t of(int agent) const { return agent < static_cast<int>(times.size()) ? times[agent] : 0; }
  void raise(int agent, uint32_t time) {
    if (agent >= static_cast<int>(times.size())) times.resize(agent + 1);
    times[agent] = std::max(times[agent], time);
  }
  void join(const Clock& other) {
    if (other.times.size() > times.size()) times.resize(other.times.size());
    for (size_t i = 0; i < other.times.size(); ++i) times[i] = std::max(times[i], other.times[i]);
  }
};

// The smallest piece of shared memory that the kernel reads or writes.
struct Unit {
  Epoch writer;
  bool written = false, under_way = false;  // under way: a copy will write it
  bool by_copy = false;                     // TMA wrote it: no fence is needed before TMA and wgmma read it
  bool barrier = false;                     // holds an mbarrier
  uint16_t in_use = 0;                      // products and stores that will still read it
  uint64_t written_by = 0;                  // the instruction, counted from the block's first
};
struct Reader {
  uint32_t time = 0;
  uint8_t lane = 0;
};

struct Range {
  uint64_t begin, end;
};

// Global memory that a launch has written to: who did. Blocks know nothing of each other.
struct GlobalUnit {
  int32_t block = -1;
  Epoch writer;
};
struct Region : Range {
  std::vector<GlobalUnit> units;  // none before the first write
  std::vector<Reader> readers;    // of the block that runs
};
struct Memory {
  std::vector<Range> ranges;    // what may be touched, by argument
  std::vector<Region> regions;  // the same without overlaps
  bool written = false;

  Region* region(uint64_t address) {
    for (Region& r : regions) {
      if (address >= r.begin && address < r.end) return &r;
    }
    return nullptr;
  }
};

// Counted while running.
struct Counts {
  std::vector<int64_t> executed;  // by op: instructions of a warp
  int64_t global_read = 0, global_written = 0, copied_in = 0, copied_out = 0, async_copied = 0;  // bytes
  int64_t shared_read = 0, shared_written = 0, operands_read = 0;  // bytes; operands: of wgmma, by a warpgroup
  int64_t shared_accesses = 0, shared_turns = 0;  // of whole warps; turns - accesses are bank conflicts
  int64_t implied_waits = 0;                      // sums used before their wait, which the assembler then puts in
};

enum class State { ready, waiting, done };
enum class Then { next, yield, retry };

class Block;

struct Group {
  int32_t at;
  Lanes lanes;
  bool held = false;  // at an instruction of the whole warp
};

struct CopyAsync {
  uint32_t shared;
  uint8_t bytes[16];
  uint8_t count;
};
struct TensorMap {  // the 128 bytes of a parameter, as tests/helpers/ptx fills them
  uint64_t data;
  int64_t rows, columns, stride;  // stride: bytes
  int32_t element, box_rows, box_columns, swizzle, magic;
};
constexpr int32_t kTensorMap = 0x7ee5;
struct StoreAsync {
  TensorMap map;
  int32_t row, column;
  uint32_t shared;
};

struct Product;
struct Products;

struct Warp {
  Warp(Block& block, int number);

  template <typename T>
  T* reg(int32_t operand) const {
    if (operand >= 0) return reinterpret_cast<T*>(registers.get() + (operand & ~63));
    constexpr int skipped = sizeof(T) == 8 ? 0 : sizeof(T) == 4 ? 8 * kLanes : 12 * kLanes;
    return reinterpret_cast<T*>(constants + kConstantBytes * (-operand - 1) + skipped);
  }
  // A register as wide as it was declared; the lane's bytes begin at lane << shift.
  uint8_t* bytes(int32_t operand, int& shift) const {
    shift = operand >= 0 ? operand & 63 : 3;
    return reinterpret_cast<uint8_t*>(reg<uint64_t>(operand));
  }
  Lanes predicate(int32_t operand) const {
    if (operand >= 0) return *reg<Lanes>(operand);
    return *reg<uint64_t>(operand) ? kAll : 0;
  }
  bool knows(const Epoch& epoch, int lane) const {
    if (epoch.agent < 0) return true;
    if (epoch.agent != number) return epoch.time < knows_of.of(epoch.agent);
    return epoch.lane == lane || epoch.time < synced;
  }
  Epoch now(int lane) const { return {static_cast<int16_t>(number), static_cast<uint8_t>(lane), time}; }
  // All lanes have met: they know of each other's accesses.
  void sync() { synced = ++time; }
  std::string name(int lane) const { return "warp " + ptx::number(number) + " lane " + ptx::number(lane); }

  Block& block;
  const int number;
  uint8_t* constants;
  std::unique_ptr<uint8_t[]> registers;
  std::vector<Group> groups;
  Lanes live = kAll;
  State state = State::ready;
  std::string waits_for;
  uint32_t time = 1, synced = 1;
  Clock knows_of, fenced;  // fenced: of what is known, that which TMA and wgmma see too

  std::vector<CopyAsync> copies[kLanes];
  std::vector<std::vector<CopyAsync>> copy_groups[kLanes];
  std::vector<StoreAsync> stores[kLanes];
  std::vector<std::vector<StoreAsync>> store_groups[kLanes];
  std::shared_ptr<Products> products;
  std::vector<bool> under_way;  // by 64 bytes of registers: sums of products that nobody has waited for
  int sums_under_way = 0;
};

// Ends all products of a warp as if it had waited for them: products.h.
void finish_products(Warp& warp);

struct Mbarrier {
  int agent, count, to_come;
  int64_t bytes = 0;  // expected and not yet there
  uint32_t phase = 0;
  Clock arrived{}, ended{};  // what those who arrived in this phase knew, and those of the last
  Clock arrived_fenced{}, ended_fenced{};
  std::vector<std::pair<Warp*, uint32_t>> waiting{};
};

class Block {
 public:
  Block(const Program& program, const uint8_t* parameters, size_t parameter_bytes, Memory& memory, int32_t block,
        uint64_t seed, Counts& counts)
      : program(program),
        parameters(parameters),
        parameter_bytes(parameter_bytes),
        counts(counts),
        random(seed),
        leader(random() % kLanes),
        shared(program.shared_bytes, 0xff),
        memory_(memory),
        block_(block),
        units_(program.shared_bytes / program.unit),
        readers_(units_.size() * program.warps) {}

  void run(const uint32_t (&at)[3], const uint32_t (&grid)[3]);

  Unit* units(const std::string& who, uint32_t address, uint32_t bytes, uint32_t aligned);
  // what: the bytes that a thread stores; writing again what another has just written is no race.
  void note_write(Warp& warp, int lane, uint32_t address, uint32_t bytes, bool under_way = false,
                  const void* what = nullptr);
  void note_read(Warp& warp, int lane, uint32_t address, uint32_t bytes);
  void note_async_read(Warp& warp, int lane, uint32_t address, uint32_t bytes);
  void end_async_read(Warp& warp, int lane, uint32_t address, uint32_t bytes);
  uint8_t* at(uint32_t address) { return &shared[address - kSharedBase]; }
  void check_global(const std::string& who, uint64_t address, size_t bytes, size_t aligned, bool write);
  void check_global(Warp& warp, int lane, uint64_t address, size_t bytes, size_t aligned, bool write);
  void note_global_read(Warp& warp, int lane, uint64_t address, uint32_t bytes);
  void note_global_write(Warp& warp, int lane, uint64_t address, uint32_t bytes, const void* what);
  std::string name(const Epoch& epoch) const;
  void count_turns(const Warp& warp, const uint32_t* addresses, Lanes lanes, int bytes);

  const Program& program;
  const uint8_t* parameters;
  size_t parameter_bytes;
  Counts& counts;
  std::mt19937_64 random;
  const int leader;  // the lane that elect.sync elects
  std::vector<uint8_t> shared;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::function<void()>> under_way;  // what will happen, at any time and in any order
  std::map<uint32_t, Mbarrier> mbarriers;
  int mbarriers_made = 0;
  std::map<int, std::vector<Warp*>> barriers;
  std::map<int, std::vector<Product>> sequences;  // by warpgroup: the products that all its warps must issue
  int32_t running = 0;                            // the instruction, for messages
  uint64_t instructions = 0;                      // executed so far

 private:
  void step();
  void run_warp(Warp& warp, int most);
  void imply_wait(Warp& warp, int32_t at);
  std::string deadlock() const;

  Memory& memory_;
  const int32_t block_;
  const Range* last_range_ = nullptr;
  std::vector<Unit> units_;
  std::vector<Reader> readers_;
};

struct Op {
  const char* name;
  Then (*run)(Warp&, const int32_t* operands, Lanes lanes);
  enum Kind { plain, whole_warp, branch, exit } kind = plain;
};
const std::vector<Op>& ops();

inline Warp::Warp(Block& whose, int which)
    : block(whose),
      number(which),
      constants(const_cast<uint8_t*>(whose.program.constants.data())),
      registers(new uint8_t[whose.program.register_bytes + 64]) {
  std::memset(registers.get(), 0xff, whose.program.register_bytes);
  groups.push_back({0, kAll});
}

inline std::string Block::name(const Epoch& epoch) const {
  if (epoch.agent < program.warps) return warps[epoch.agent]->name(epoch.lane);
  return "a copy";
}

inline void Block::run(const uint32_t (&where)[3], const uint32_t (&grid)[3]) {
  for (Region& region : memory_.regions) std::fill(region.readers.begin(), region.readers.end(), Reader{});
  for (int w = 0; w < program.warps; ++w) {
    warps.push_back(std::make_unique<Warp>(*this, w));
    Warp& warp = *warps.back();
    const auto fill = [&](int which, const std::function<uint32_t(int)>& value) {
      if (program.special[which] < 0) return;
      for (int lane = 0; lane < kLanes; ++lane) warp.reg<uint32_t>(program.special[which])[lane] = value(lane);
    };
    fill(0, [&](int lane) { return kLanes * w + lane; });
    fill(1, [&](int lane) { return lane; });
    for (int axis = 0; axis < 3; ++axis) {
      fill(2 + axis, [&](int) { return where[axis]; });
      fill(5 + axis, [&](int) { return grid[axis]; });
    }
    fill(8, [&](int) { return kLanes * program.warps; });
  }
  while (true) {
    int done = 0;
    for (const auto& warp : warps) done += warp->state == State::done;
    if (done == program.warps) break;
    step();
  }
  if (!under_way.empty()) throw Trap("the block ends with copies under way");
}

// Lets one warp go on to where it must wait, or something under way happen.
inline void Block::step() {
  Warp* ready[kLanes];
  int count = 0;
  for (const auto& warp : warps) {
    if (warp->state == State::ready) ready[count++] = warp.get();
  }
  if (!under_way.empty() && (!count || random() % 64 == 0)) {
    std::swap(under_way[random() % under_way.size()], under_way.back());
    const std::function<void()> happens = std::move(under_way.back());
    under_way.pop_back();
    return happens();
  }
  if (!count) throw Trap(deadlock());
  run_warp(*ready[random() % count], 1 + random() % 512);
}

inline std::string Block::deadlock() const {
  std::string text = "deadlock:";
  for (const auto& warp : warps) {
    if (warp->state == State::waiting) text += " warp " + number(warp->number) + " waits " + warp->waits_for + ";";
  }
  return text;
}

// The PTX ISA says nothing of what an instruction finds in sums that nobody has waited for; ptxas waits (C7517).
inline void Block::imply_wait(Warp& warp, int32_t at) {
  const int32_t end = at + 1 < static_cast<int32_t>(program.code.size())
                          ? program.code[at + 1].first
                          : static_cast<int32_t>(program.operands.size());
  for (int32_t i = program.code[at].first; i < end; ++i) {
    const int32_t operand = program.operands[i];
    if (!program.is_register[i] || !warp.under_way[operand >> 6]) continue;
    ++counts.implied_waits;
    return finish_products(warp);
  }
}

inline void Block::run_warp(Warp& warp, int most) {
  const std::vector<Op>& all = ops();
  while (most-- > 0) {
    Group* group = nullptr;
    for (Group& other : warp.groups) {
      if (!other.held && (!group || other.at < group->at)) group = &other;
    }
    if (!group) throw Trap("divergence: the lanes of warp " + number(warp.number) + " never meet again");
    const Instruction& instruction = program.code[group->at];
    running = group->at;
    ++instructions;
    Lanes lanes = group->lanes;
    if (instruction.guard >= 0) {
      const Lanes guard = *warp.reg<Lanes>(instruction.guard);
      lanes &= instruction.negated ? ~guard : guard;
    }
    const Op& op = all[instruction.op];
    const int32_t* operands = &program.operands[instruction.first];
    Then then = Then::next;
    if (op.kind == Op::branch) {
      const Lanes stay = group->lanes & ~lanes;
      ++counts.executed[instruction.op];
      if (!stay) {
        group->at = operands[0];
      } else {
        group->lanes = stay;
        ++group->at;
        if (lanes) warp.groups.push_back({operands[0], lanes});
      }
    } else if (op.kind == Op::exit) {
      warp.live &= ~lanes;
      group->lanes &= ~lanes;
      ++group->at;
    } else if (op.kind == Op::whole_warp && lanes && lanes != warp.live) {
      if (group->lanes != lanes) throw Trap("a guard parts the lanes of warp " + number(warp.number));
      group->held = true;
      continue;
    } else {
      if (lanes) {
        ++counts.executed[instruction.op];
        if (warp.sums_under_way && op.kind == Op::plain) imply_wait(warp, group->at);
        then = op.run(warp, operands, lanes);
      }
      if (then != Then::retry) ++group->at;
    }
    if (warp.groups.size() > 1 || !group->lanes) {
      std::vector<Group> merged;
      for (const Group& g : warp.groups) {
        if (!g.lanes) continue;
        bool found = false;
        for (Group& m : merged) {
          if (m.at != g.at) continue;
          m.lanes |= g.lanes;
          m.held = false;
          found = true;
        }
        if (!found) merged.push_back(g);
      }
      warp.groups = merged;
      if (merged.empty()) {
        for (int lane = 0; lane < kLanes; ++lane) {
          bool left = !warp.copies[lane].empty() || !warp.stores[lane].empty();
          for (const auto& open : warp.store_groups[lane]) left |= !open.empty();
          if (left) throw Trap(warp.name(lane) + " ends with copies that it has not waited for");
        }
        warp.state = State::done;
        return;
      }
    }
    if (then != Then::next || warp.state != State::ready) return;
  }
}

}  // namespace ptx

#include "tracking.h"
