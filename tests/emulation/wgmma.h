// Products of a warpgroup, for csrc/device/hopper.cuh. Each warp computes its 16 rows by itself, as late or as early as
// the rules allow; all four must issue the same.
#pragma once

#include "hopper.h"

namespace emulation {

// Where the chunks of 16 bytes of an operand lie, by its descriptor: the PTX ISA's canonical layouts. K-major: chunk
// `chunk` along row `row`, the inner axis along the row. MN-major, or transposed: chunk `row` of the outer axis, at
// place `chunk` of the inner one.
inline uint32_t operand_address(uint64_t descriptor, int row, int chunk, bool transposed = false) {
  const auto field = [descriptor](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const int mode = static_cast<int>(descriptor >> 62), bits = mode ? 4 - mode : 0;
  if (descriptor >> 49 & 7) throw Trap("a base offset is not emulated");
  if (mode && start & ((128 << bits) - 1) & ~((16u << bits) - 1)) {
    throw Trap("an operand at " + std::to_string(start) + " does not begin where its swizzle does");
  }
  if (transposed) {  // with swizzle ((T, w, m), (8, k)):((1, T, LBO), (w T, SBO)), without ((T, 1, m), (8, k)):
    const int wide = 1 << bits;  //                                          ((1, T, SBO), (1 T, LBO))
    const uint32_t outer = row / wide * (mode ? leading : stride), inner = chunk / 8 * (mode ? stride : leading);
    return permuted(start + outer + inner + chunk % 8 * (16 << bits) + row % wide * 16, bits);
  }
  const uint32_t groups = start + row / 8 * stride;
  if (!mode) return groups + row % 8 * 16 + chunk * leading;
  return permuted(groups + row % 8 * (16 << bits) + chunk * 16, bits);
}

// f(row, chunk, address) for every 16 bytes that a warp's part of a product reads: 16 rows of a, or all if `all_of_a`
// (nothing says which warp reads which), if it is not in registers; all of b. If b is transposed, 16 bytes are
// columns 8 (row - 16) .. of place `chunk` of the inner axis.
template <typename F>
void for_operands(const Product& p, int warp, bool all_of_a, F f) {
  for (int i = 0; !p.in_registers && i < (all_of_a ? 64 : 16); ++i) {
    for (int chunk = 0; chunk < 2; ++chunk) f(i, chunk, operand_address(p.a, (all_of_a ? 0 : 16 * warp) + i, chunk));
  }
  for (int i = 0; i < (p.transposed ? p.columns / 8 : p.columns); ++i) {
    for (int chunk = 0; chunk < (p.transposed ? 16 : 2); ++chunk) {
      f(16 + i, chunk, operand_address(p.b, i, chunk, p.transposed));
    }
  }
}

inline void compute(Block& block, Product& p, int warp, ProductQueue::Sums& sums) {
  std::vector<float> operands(16 * (16 + p.columns));
  for_operands(p, warp, false, [&](int row, int chunk, uint32_t address) {
    for (int i = 0; i < 8; ++i) {
      uint16_t bits;
      std::memcpy(&bits, &block.shared[address + 2 * i], 2);
      const bool across = p.transposed && row >= 16;
      operands[across ? 16 * (16 + 8 * (row - 16) + i) + chunk : 16 * row + 8 * chunk + i] = p.convert(bits);
    }
  });
  // As they are now: who writes them again before product_wait may change the product.
  for (int i = 0; p.in_registers && i < 32 * 8; ++i) {
    const int lane = i / 8, word = i / 2 % 4, row = lane / 4 + 8 * (word % 2), column = lane % 4 * 2 + word / 2 * 8;
    operands[16 * row + column + i % 2] = p.convert(static_cast<uint16_t>(p.registers[lane][word] >> 16 * (i % 2)));
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < p.columns / 2; ++i) {
      const float* a = &operands[16 * (lane / 4 + 8 * (i / 2 % 2))];
      const float* b = &operands[16 * (16 + i / 4 * 8 + lane % 4 * 2 + i % 2)];
      float& to = sums.values[lane][i];
      double sum = p.add ? to : 0.0;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[k]) * b[k];
      to = static_cast<float>(sum);
    }
  }
  p.computed = true;
}

inline const float& spoiled() {
  static const float nan = std::nanf("0xdead");
  return nan;
}

inline void product_fence() {
  thread().together("product_fence", nullptr, [](Thread* const* lanes) {
    hopper_of(lanes[0]->block).queues[lanes[0]->number / 32].fenced = true;
  });
}

inline void issue(Product mine) {
  thread().together("multiply_add_async", &mine, [](Thread* const* lanes) {
    Block& block = lanes[0]->block;
    const auto of = [lanes](int i) { return *static_cast<Product*>(lanes[i]->operands); };
    const auto same = [](const Product& p, const Product& q) {
      return p.a == q.a && p.b == q.b && p.columns == q.columns && p.convert == q.convert && p.add == q.add &&
             p.transposed == q.transposed && p.in_registers == q.in_registers;
    };
    const unsigned warp = lanes[0]->number / 32;
    ProductQueue& queue = hopper_of(block).queues[warp];
    std::vector<Product>& sequence = hopper_of(block).sequences[warp / 4];
    Product product = of(0);
    if (queue.issued == sequence.size()) sequence.push_back(product);
    bool agreed = same(product, sequence[queue.issued++]);
    for (int i = 1; i < 32; ++i) agreed &= same(product, of(i));
    if (!agreed) throw Trap("divergence: the warps of " + lanes[0]->name() + "'s warpgroup want different products");

    ProductQueue::Sums& held = queue.sums[product.sums];
    if (!held.products++) {
      if (!queue.fenced) throw Trap(lanes[0]->name() + " begins a product with no product_fence");
      for (int i = 0; i < 32; ++i) {
        held.registers[i] = of(i).sums;
        held.values[i].assign(held.registers[i], held.registers[i] + product.columns / 2);
        std::fill_n(held.registers[i], product.columns / 2, spoiled());
      }
    }
    for (int i = 0; i < 32; ++i) product.registers[i] = of(i).registers[0];
    for_operands(product, warp % 4, true,
                 [&](int, int, uint32_t address) { note_async_read(block, lanes, 32, address, 16); });
    bool first = true;
    for (const std::vector<Product>& group : queue.groups) first &= group.empty() || group.back().computed;
    for (const Product& before : queue.open) first &= before.computed;
    if (first && block.random() % 2) compute(block, product, warp % 4, held);
    queue.open.push_back(product);
  });
}

inline void multiply_add_async(float (*convert)(uint16_t), int columns, float* sums, uint64_t a, uint64_t b, bool add) {
  issue({a, b, columns, convert, add, sums});
}

// a in registers: the PTX ISA's layout of it is that of mma.m16n8k16, for each warp.
inline void multiply_transposed_async(float (*convert)(uint16_t), int columns, float* sums, const uint32_t* a,
                                      uint64_t b, bool add) {
  issue({0, b, columns, convert, add, sums, true, true, {a}});
}

inline void product_commit() {
  thread().together("product_commit", nullptr, [](Thread* const* lanes) {
    ProductQueue& queue = hopper_of(lanes[0]->block).queues[lanes[0]->number / 32];
    queue.groups.push_back(std::move(queue.open));
    queue.open.clear();
  });
}

inline void product_wait(int pending) {
  thread().together("product_wait", &pending, [](Thread* const* lanes) {
    const int pending = *static_cast<int*>(lanes[0]->operands);
    Thread& first = *lanes[0];
    Block& block = first.block;
    const int warp = first.number / 32;
    ProductQueue& queue = hopper_of(block).queues[warp];
    for (; static_cast<int>(queue.groups.size()) > pending; queue.groups.pop_front()) {
      for (Product& product : queue.groups.front()) {
        ProductQueue::Sums& sums = queue.sums[product.sums];
        if (!product.computed) compute(block, product, warp % 4, sums);
        for_operands(product, warp % 4, true, [&](int, int, uint32_t at) { end_async_read(block, first, at, 16); });
        if (--sums.products) continue;
        for (int i = 0; i < 32; ++i) {
          for (int j = 0; j < product.columns / 2; ++j) {
            if (std::memcmp(&sums.registers[i][j], &spoiled(), sizeof(float))) {
              throw Trap(lanes[i]->name() + " wrote sums of a product under way");
            }
          }
          std::copy(sums.values[i].begin(), sums.values[i].end(), sums.registers[i]);
        }
        queue.sums.erase(product.sums);
        queue.fenced = false;
      }
    }
    for (int i = 1; i < 32; ++i) lanes[i]->clock[first.number] = first.time();
    ++first.time();
  });
}

}  // namespace emulation
