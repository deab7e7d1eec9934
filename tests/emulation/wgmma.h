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

// Elements of the inner axis that a product takes: 32 bytes.
inline int depth_of(const Product& p) { return p.convert == &from_e4m3 ? 32 : 16; }

// f(address, where, step) for every 16 bytes that a warp's part of a product reads, of a all rows if `all_of_a`:
// nothing says which warp reads which. They are elements where, where + step ... of 16 rows of a, `depth_of` elements
// each, and b's.
template <typename F>
void for_operands(const Product& p, int warp, bool all_of_a, F f) {
  const int depth = depth_of(p), half = depth / 2;
  for (int i = 0; !p.in_registers && i < (all_of_a ? 64 : 16); ++i) {
    const int row = all_of_a ? i : 16 * warp + i;
    for (int chunk = 0; chunk < 2; ++chunk) f(operand_address(p.a, row, chunk), depth * i + half * chunk, 1);
  }
  for (int i = 0; i < p.columns / 8; ++i) {
    for (int j = 0; j < 16; ++j) {
      if (p.transposed) f(operand_address(p.b, i, j, true), 16 * (16 + 8 * i) + j, 16);
      if (!p.transposed)
        f(operand_address(p.b, 8 * i + j / 2, j % 2), depth * (16 + 8 * i + j / 2) + half * (j % 2), 1);
    }
  }
}

// Adds up e4m3 products as Hopper's tensor cores are understood to: each, and the sum so far, loses what lies more than
// 13 places below the largest exponent among them, that of a product being the sum of its factors', not normalised.
// What they come to is then cut to 14 bits. After the model of Badash et al. 2026, "Hawkeye" (arXiv 2603.20421); see
// also Khattak and Mikaitis 2025, "Accurate Models of NVIDIA Tensor Cores" (arXiv 2512.07004).
inline float add_in_14_bits(float sum, const float* a, const float* b, int count) {
  const auto exponent = [](float x, int least) { return x ? std::max(std::ilogb(x), least) : -1000; };
  int most = exponent(sum, -126);
  bool finite = std::isfinite(sum);
  for (int k = 0; k < count; ++k) {
    finite &= std::isfinite(a[k]) && std::isfinite(b[k]);
    if (finite && a[k] && b[k]) most = std::max(most, exponent(a[k], -6) + exponent(b[k], -6));
  }
  if (!finite) return NAN;
  const auto cut = [](double x, double places) { return std::trunc(x * places) / places; };
  const double places = std::ldexp(1.0, 13 - most);
  double total = cut(sum, places);
  for (int k = 0; k < count; ++k) total += cut(static_cast<double>(a[k]) * b[k], places);
  return static_cast<float>(total ? cut(total, std::ldexp(1.0, 13 - std::ilogb(total))) : 0.0);
}

inline void compute(Block& block, Product& p, int warp, ProductQueue::Sums& sums) {
  const int depth = depth_of(p), bytes = 32 / depth;
  std::vector<float> operands(depth * (16 + p.columns));
  for_operands(p, warp, false, [&](uint32_t address, int where, int step) {
    for (int i = 0; i < depth / 2; ++i) {
      uint16_t bits = 0;
      std::memcpy(&bits, &block.shared[address + bytes * i], bytes);
      operands[where + step * i] = p.convert(bits);
    }
  });
  // As they are now: who writes them again before product_wait may change the product.
  for (int i = 0; p.in_registers && i < 32 * 8; ++i) {
    const int lane = i / 8, word = i / 2 % 4, row = lane / 4 + 8 * (word % 2), column = lane % 4 * 2 + word / 2 * 8;
    operands[16 * row + column + i % 2] = p.convert(static_cast<uint16_t>(p.registers[lane][word] >> 16 * (i % 2)));
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < p.columns / 2; ++i) {
      const float* a = &operands[depth * (lane / 4 + 8 * (i / 2 % 2))];
      const float* b = &operands[depth * (16 + i / 4 * 8 + lane % 4 * 2 + i % 2)];
      float& to = sums.values[lane][i];
      if (bytes == 1) {
        to = add_in_14_bits(p.add ? to : 0.0f, a, b, depth);
        continue;
      }
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
                 [&](uint32_t address, int, int) { note_async_read(block, lanes, 32, address, 16); });
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
        for_operands(product, warp % 4, true, [&](uint32_t at, int, int) { end_async_read(block, first, at, 16); });
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
    for (int i = 1; i < 32; ++i) lanes[i]->clock[first.agent] = first.time();
    ++first.time();
  });
}

}  // namespace emulation
