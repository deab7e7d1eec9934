// The instructions of a warp, for csrc/device/atoms.cuh.
#pragma once

#include <set>

#include "emulation.h"
#include "numbers.h"

namespace emulation {

// As late as the rules allow: the bytes are read now, and come when they are waited for.
inline void Thread::copy_async(uint32_t shared, const void* global, bool valid) {
  Copy copy{shared, {}};
  if (valid) {
    block.check_global(*this, global, 16, 16, false);
    std::memcpy(copy.bytes, global, 16);
  }
  block.note_write(*this, shared, 16, true);
  open_.push_back(copy);
}

inline void Thread::copy_commit() { groups_.push_back(std::move(open_)), open_.clear(); }

inline void Thread::copy_wait(int pending) {
  for (; static_cast<int>(groups_.size()) > pending; groups_.pop_front()) {
    for (const Copy& copy : groups_.front()) {
      block.note_write(*this, copy.shared, 16, false);
      std::memcpy(&block.shared[copy.shared], copy.bytes, 16);
    }
  }
}

template <typename T>
T Thread::shuffle_xor(T x, int mask) {
  struct Operands {
    T in, out;
    int mask;
  } mine{x, T{}, mask};
  together("shuffle", &mine, [](Thread* const* lanes) {
    const auto of = [lanes](int i) { return static_cast<Operands*>(lanes[i]->operands); };
    for (int i = 0; i < 32; ++i) of(i)->out = of(i ^ of(i)->mask)->in;
  });
  return mine.out;
}

inline void Thread::load_matrices(uint32_t (&to)[4], uint32_t shared, bool transposed) {
  struct Operands {
    uint32_t address, out[4];
    bool transposed;
  } mine{shared, {}, transposed};
  together(transposed ? "load_matrices_transposed" : "load_matrices", &mine, [](Thread* const* lanes) {
    Block& block = lanes[0]->block;
    const auto of = [lanes](int i) { return static_cast<Operands*>(lanes[i]->operands); };
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      std::set<uint32_t> lines;
      std::vector<int> turns(8);
      for (int row = 0; row < 8; ++row) {
        const uint32_t address = of(8 * m + row)->address;
        block.note_read(*lanes[8 * m + row], address, 16);
        std::memcpy(matrix[row], &block.shared[address], 16);
        if (lines.insert(address / 16).second && turns[address / 16 % 8]++) ++block.bank_conflicts;
      }
      for (int i = 0; i < 32; ++i) {
        const int row = i / 4, column = 2 * (i % 4);
        const uint16_t low = of(0)->transposed ? matrix[column][row] : matrix[row][column];
        const uint16_t high = of(0)->transposed ? matrix[column + 1][row] : matrix[row][column + 1];
        of(i)->out[m] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
  std::memcpy(to, mine.out, sizeof(to));
}

// mma.m16n8k16; where each element lies is the PTX ISA's table for it.
inline void Thread::multiply_add(float (*convert)(uint16_t), float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                 uint32_t b1) {
  struct Operands {
    uint32_t in[6];
    float* sums;
    float (*convert)(uint16_t);
  } mine{{a[0], a[1], a[2], a[3], b0, b1}, c, convert};
  together("multiply_add", &mine, [](Thread* const* lanes) {
    float left[16][16], right[16][8];
    const auto of = [lanes](int i) { return static_cast<Operands*>(lanes[i]->operands); };
    for (int i = 0; i < 32; ++i) {
      const int group = i / 4, pair = 2 * (i % 4);
      for (int e = 0; e < 2; ++e) {
        const auto half = [&](int n) { return of(0)->convert(static_cast<uint16_t>(of(i)->in[n] >> 16 * e)); };
        left[group][pair + e] = half(0);
        left[group + 8][pair + e] = half(1);
        left[group][pair + 8 + e] = half(2);
        left[group + 8][pair + 8 + e] = half(3);
        right[pair + e][group] = half(4);
        right[pair + 8 + e][group] = half(5);
      }
    }
    for (int i = 0; i < 32; ++i) {
      for (int e = 0; e < 4; ++e) {
        const int row = i / 4 + 8 * (e / 2), column = 2 * (i % 4) + e % 2;
        double sum = of(i)->sums[e];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[row][k]) * right[k][column];
        of(i)->sums[e] = static_cast<float>(sum);
      }
    }
  });
}

// The nth access of each lane to shared memory is one instruction of its warp; 32 banks are 4 bytes wide each.
inline void Block::count_conflicts(Thread& thread, uint32_t address) {
  const auto which = std::make_pair(thread.number / 32, thread.accesses++);
  std::vector<uint32_t>& lanes = accesses_[which];
  lanes.push_back(address);
  if (lanes.size() < 32) return;
  const std::set<uint32_t> distinct(lanes.begin(), lanes.end());
  int turns[32] = {};
  for (uint32_t at : distinct) ++turns[at / 4 % 32];
  bank_conflicts += *std::max_element(turns, turns + 32) - 1;
  accesses_.erase(which);
}

inline uint32_t Thread::load_shared_pair(uint32_t from) {
  block.count_conflicts(*this, from);
  block.note_read(*this, from, 4);
  uint32_t pair;
  std::memcpy(&pair, &block.shared[from], sizeof(pair));
  return pair;
}

inline void Thread::store_shared_pair(uint32_t to, uint32_t pair) {
  block.count_conflicts(*this, to);
  block.note_write(*this, to, 4, false);
  std::memcpy(&block.shared[to], &pair, sizeof(pair));
}

}  // namespace emulation
