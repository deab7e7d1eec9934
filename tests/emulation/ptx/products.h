// Tensor cores: mma.sync of a warp, wgmma of a warpgroup. Where each element lies is the PTX ISA's tables for them; how
// an operand lies in shared memory, and how e4m3 products are added up, is in ../wgmma.h.
#pragma once

#include "tma.h"

namespace ptx {

// Elements as the tensor cores take them.
struct Bf16 {
  using Bits = uint16_t;
  using Sum = float;
  static float value(uint16_t x) { return from_bf16(x); }
};
struct Fp16 {
  using Bits = uint16_t;
  using Sum = float;
  static float value(uint16_t x) { return emulation::from_fp16(x); }
};
struct Tf32 {
  using Bits = uint32_t;
  using Sum = float;
  static float value(uint32_t x) { return as_float(x & ~0x1fffu); }
};
struct E4m3 {
  using Bits = uint8_t;
  using Sum = float;
  static float value(uint8_t x) {
    static const std::vector<float> all = [] {
      std::vector<float> table(256);
      for (int i = 0; i < 256; ++i) table[i] = emulation::from_e4m3(i);
      return table;
    }();
    return all[x];
  }
};
struct S8 {
  using Bits = int8_t;
  using Sum = int32_t;
  static int32_t value(int8_t x) { return x; }
};

// sums += a b of 16 rows; a: [16][depth], b: [depth][columns] or, of e4m3, [columns][depth].
template <typename T>
constexpr bool kByColumn = std::is_same<T, E4m3>::value;

template <typename T>
void multiply_add(typename T::Sum* sums, const typename T::Sum* a, const typename T::Sum* b, int columns) {
  constexpr int depth = 32 / sizeof(typename T::Bits);
  if constexpr (kByColumn<T>) {
    for (int row = 0; row < 16; ++row) {
      for (int c = 0; c < columns; ++c) {
        float& sum = sums[row * columns + c];
        sum = emulation::add_in_14_bits(sum, a + depth * row, b + depth * c, depth);
      }
    }
  } else {
    using Wide = std::conditional_t<std::is_same<T, S8>::value, int32_t, double>;
    Wide line[256];
    for (int row = 0; row < 16; ++row) {
      for (int c = 0; c < columns; ++c) line[c] = sums[row * columns + c];
      for (int k = 0; k < depth; ++k) {
        const Wide x = a[depth * row + k];
        for (int c = 0; c < columns; ++c) line[c] += x * b[k * columns + c];
      }
      for (int c = 0; c < columns; ++c) sums[row * columns + c] = static_cast<typename T::Sum>(line[c]);
    }
  }
}

// Of 16 x depth elements those in four registers of each lane.
template <typename T, typename Registers>
void gather_a(typename T::Sum* a, Registers registers) {
  constexpr int each = 4 / sizeof(typename T::Bits), depth = 8 * each;
  for (int n = 0; n < 4; ++n) {
    const uint32_t* of = registers(n);
    for (int i = 0; i < kLanes; ++i) {
      typename T::Bits x[each];
      std::memcpy(x, &of[i], 4);
      const int row = i / 4 + 8 * (n % 2), k = i % 4 * each + n / 2 * (depth / 2);
      for (int e = 0; e < each; ++e) a[depth * row + k + e] = T::value(x[e]);
    }
  }
}

// d, a, b, c.
template <typename T>
Then multiply_warp(Warp& w, const int32_t* o, Lanes) {
  using Sum = typename T::Sum;
  constexpr int each = 4 / sizeof(typename T::Bits), depth = 8 * each;
  Sum a[16 * depth], b[depth * 8], sums[16 * 8];
  // tf32 has half the depth: a of four registers, b of two.
  gather_a<T>(a, [&](int n) { return w.reg<uint32_t>(o[4 + n]); });
  for (int n = 0; n < 2; ++n) {
    const uint32_t* of = w.reg<uint32_t>(o[8 + n]);
    for (int i = 0; i < kLanes; ++i) {
      typename T::Bits x[each];
      std::memcpy(x, &of[i], 4);
      for (int e = 0; e < each; ++e) {
        const int k = i % 4 * each + n * (depth / 2) + e, column = i / 4;
        b[kByColumn<T> ? depth * column + k : 8 * k + column] = T::value(x[e]);
      }
    }
  }
  const auto at = [](int i, int n) { return 8 * (i / 4 + 8 * (n / 2)) + 2 * (i % 4) + n % 2; };
  for (int n = 0; n < 4; ++n) {
    const Sum* from = w.reg<Sum>(o[10 + n]);
    for (int i = 0; i < kLanes; ++i) sums[at(i, n)] = from[i];
  }
  multiply_add<T>(sums, a, b, 8);
  for (int n = 0; n < 4; ++n) {
    Sum* to = w.reg<Sum>(o[n]);
    for (int i = 0; i < kLanes; ++i) to[i] = sums[at(i, n)];
  }
  return Then::next;
}

struct Product {
  uint64_t a, b;
  int columns;
  bool add, in_registers, a_transposed, b_transposed;
  int32_t sums;              // the first register: the name of the accumulators
  const int32_t* registers;  // of a, if it is in them
  void (*compute)(Warp&, Product&);
  bool computed = false;

  bool operator==(const Product& p) const {
    return a == p.a && b == p.b && columns == p.columns && add == p.add && in_registers == p.in_registers &&
           a_transposed == p.a_transposed && b_transposed == p.b_transposed && compute == p.compute;
  }
};

// One warp's quarter of its warpgroup's products.
struct Products {
  struct Sums {
    const int32_t* registers;
    std::vector<uint32_t> values;  // [16][columns]
    int products = 0;              // under way
  };
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::map<int32_t, Sums> sums;
  bool fenced = false;
  size_t issued = 0;
};
constexpr uint32_t kSpoiled = 0x7fc0dead;

// f(address, first, k, step of first, step of k) for every 16 bytes of an operand: elements first, first + step ... of
// the outer axis (rows of a, columns of b), and so k of the inner one.
template <typename F>
void for_operand(uint64_t descriptor, bool transposed, int first, int outer, int depth, F f) {
  const int chunk = depth / 2;  // elements in 16 bytes
  if (transposed) {
    for (int i = first / chunk; i < (first + outer + chunk - 1) / chunk; ++i) {
      for (int k = 0; k < depth; ++k) f(emulation::operand_address(descriptor, i, k, true), i * chunk - first, k, 1, 0);
    }
  } else {
    for (int i = 0; i < outer; ++i) {
      for (int c = 0; c < 2; ++c) f(emulation::operand_address(descriptor, first + i, c), i, chunk * c, 0, 1);
    }
  }
}
// All of both operands: nothing says which warp reads which rows of a.
template <typename F>
void for_operands(const Product& p, int depth, F f) {
  if (!p.in_registers) for_operand(p.a, p.a_transposed, 0, 64, depth, f);
  for_operand(p.b, p.b_transposed, 0, p.columns, depth, f);
}

template <typename T>
void compute(Warp& w, Product& p) {
  using Bits = typename T::Bits;
  using Sum = typename T::Sum;
  constexpr int depth = 32 / sizeof(Bits), chunk = depth / 2;
  Sum a[16 * depth];
  static std::vector<Sum> b(256 * 32);
  const auto read = [&](uint64_t descriptor, bool transposed, int first, int outer, auto put) {
    for_operand(descriptor, transposed, first, outer, depth, [&](uint32_t address, int row, int k, int dr, int dk) {
      Bits x[chunk];
      std::memcpy(x, w.block.at(address), 16);
      for (int e = 0; e < chunk; ++e) put(row + e * dr, k + e * dk, T::value(x[e]));
    });
  };
  const int quarter = w.number % 4;
  if (p.in_registers) {  // as they are now: who writes them again before the wait may change the product
    gather_a<T>(a, [&](int n) { return w.reg<uint32_t>(p.registers[n]); });
  } else {
    read(p.a, p.a_transposed, 16 * quarter, 16, [&](int row, int k, Sum x) { a[depth * row + k] = x; });
  }
  read(p.b, p.b_transposed, 0, p.columns,
       [&](int column, int k, Sum x) { b[kByColumn<T> ? depth * column + k : p.columns * k + column] = x; });
  std::vector<uint32_t>& values = w.products->sums[p.sums].values;
  if (!p.add) std::fill(values.begin(), values.end(), 0);
  multiply_add<T>(reinterpret_cast<Sum*>(values.data()), a, b.data(), p.columns);
  p.computed = true;
}

inline int where_in_sums(int lane, int n, int columns) {
  return columns * (lane / 4 + 8 * (n / 2 % 2)) + n / 4 * 8 + lane % 4 * 2 + n % 2;
}

inline Products& products_of(Warp& w) {
  if (!w.products) w.products = std::make_shared<Products>();
  return *w.products;
}
inline Then product_fence(Warp& w, const int32_t*, Lanes) {
  products_of(w).fenced = true;
  return Then::next;
}

// How many columns; {sums}, a or {a}, b, p, then factors of a and b (1), and for 16-bit elements whether a (if not in
// registers) and b are transposed.
template <typename T, bool in_registers>
Then multiply_async(Warp& w, const int32_t* o, Lanes) {
  const int columns = *o++;
  constexpr int depth = 32 / sizeof(typename T::Bits);
  constexpr bool is_integer = std::is_same<T, S8>::value, is_wide = sizeof(typename T::Bits) == 2;
  const int32_t* rest = o + columns / 2 + (in_registers ? 4 : 1);
  const auto immediate = [&](int n) { return static_cast<int64_t>(*w.reg<uint64_t>(rest[2 + n])); };
  if (!is_integer && (immediate(0) != 1 || immediate(1) != 1)) throw Trap("negated operands of wgmma are not emulated");
  const uint64_t b = *w.reg<uint64_t>(rest[0]);
  Product p{in_registers ? 0 : *w.reg<uint64_t>(o[columns / 2]),
            b,
            columns,
            (w.predicate(rest[1]) & 1) != 0,
            in_registers,
            is_wide && !in_registers && immediate(2),
            is_wide && immediate(in_registers ? 2 : 3),
            o[0],
            o + columns / 2,
            compute<T>};
  for (int i = 0; i < kLanes; ++i) {
    if (w.reg<uint64_t>(rest[0])[i] != b || (!in_registers && w.reg<uint64_t>(o[columns / 2])[i] != p.a)) {
      throw Trap("divergence: the lanes of " + w.name(i) + " want different products");
    }
  }
  Block& block = w.block;
  Products& queue = products_of(w);
  std::vector<Product>& sequence = block.sequences[w.number / 4];
  if (queue.issued == sequence.size()) sequence.push_back(p);
  if (!(sequence[queue.issued++] == p)) {
    throw Trap("divergence: the warps of warp " + number(w.number) + "'s warpgroup want different products");
  }
  Products::Sums& held = queue.sums[p.sums];
  if (!held.products++) {
    if (!queue.fenced) throw Trap("warp " + number(w.number) + " begins a product with no wgmma.fence");
    held.registers = o;
    w.under_way.resize(w.block.program.register_bytes / 64 + 1);
    for (int n = 0; n < columns / 2; ++n) w.under_way[o[n] >> 6] = true;
    ++w.sums_under_way;
    held.values.resize(16 * columns);
    for (int n = 0; n < columns / 2; ++n) {
      uint32_t* from = w.reg<uint32_t>(o[n]);
      for (int i = 0; i < kLanes; ++i) {
        held.values[where_in_sums(i, n, columns)] = from[i];
        from[i] = kSpoiled;
      }
    }
  }
  for_operands(p, depth, [&](uint32_t at, int, int, int, int) { block.note_async_read(w, kAllOf, at, 16); });
  if (w.number % 4 == 0) block.counts.operands_read += 32 * (columns + (in_registers ? 0 : 64));
  bool first = true;
  for (const auto& group : queue.groups) first &= group.empty() || group.back().computed;
  for (const Product& before : queue.open) first &= before.computed;
  if (first && block.random() % 2) p.compute(w, p);
  queue.open.push_back(p);
  return Then::next;
}

inline Then product_commit(Warp& w, const int32_t*, Lanes) {
  Products& queue = products_of(w);
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
  return Then::next;
}

inline int depth_of(const Product& p) {
  return p.compute == compute<Bf16> || p.compute == compute<Fp16> ? 16 : p.compute == compute<Tf32> ? 8 : 32;
}

inline void wait_for_products(Warp& w, size_t pending) {
  Products& queue = products_of(w);
  while (queue.groups.size() > pending) {
    for (Product& p : queue.groups.front()) {
      if (!p.computed) p.compute(w, p);
      for_operands(p, depth_of(p), [&](uint32_t at, int, int, int, int) { w.block.end_async_read(w, kAllOf, at, 16); });
      Products::Sums& sums = queue.sums[p.sums];
      if (--sums.products) continue;
      for (int n = 0; n < p.columns / 2; ++n) {
        uint32_t* to = w.reg<uint32_t>(sums.registers[n]);
        for (int i = 0; i < kLanes; ++i) {
          if (to[i] != kSpoiled) throw Trap(w.name(i) + " wrote sums of a product under way");
          to[i] = sums.values[where_in_sums(i, n, p.columns)];
        }
        w.under_way[sums.registers[n] >> 6] = false;
      }
      --w.sums_under_way;
      queue.sums.erase(p.sums);
      queue.fenced = false;
    }
    queue.groups.erase(queue.groups.begin());
  }
}
inline Then product_wait(Warp& w, const int32_t* o, Lanes) {
  wait_for_products(w, *w.reg<uint32_t>(o[0]));
  return Then::next;
}
inline void finish_products(Warp& w) {
  product_commit(w, nullptr, kAll);
  wait_for_products(w, 0);
}

inline void add_products(std::vector<Op>& all) {
  const auto kind = Op::whole_warp;
  all.push_back({"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", multiply_warp<Bf16>, kind});
  all.push_back({"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", multiply_warp<Fp16>, kind});
  all.push_back({"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", multiply_warp<Tf32>, kind});
  all.push_back({"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", multiply_warp<E4m3>, kind});
  all.push_back({"mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", multiply_warp<S8>, kind});
  all.push_back({"wgmma.mma_async.sync.aligned.k16.f32.bf16.bf16", multiply_async<Bf16, false>, kind});
  all.push_back({"wgmma.mma_async.sync.aligned.k16.f32.bf16.bf16.registers", multiply_async<Bf16, true>, kind});
  all.push_back({"wgmma.mma_async.sync.aligned.k16.f32.f16.f16", multiply_async<Fp16, false>, kind});
  all.push_back({"wgmma.mma_async.sync.aligned.k16.f32.f16.f16.registers", multiply_async<Fp16, true>, kind});
  all.push_back({"wgmma.mma_async.sync.aligned.k8.f32.tf32.tf32", multiply_async<Tf32, false>, kind});
  all.push_back({"wgmma.mma_async.sync.aligned.k8.f32.tf32.tf32.registers", multiply_async<Tf32, true>, kind});
  all.push_back({"wgmma.mma_async.sync.aligned.k32.f32.e4m3.e4m3", multiply_async<E4m3, false>, kind});
  all.push_back({"wgmma.mma_async.sync.aligned.k32.f32.e4m3.e4m3.registers", multiply_async<E4m3, true>, kind});
  all.push_back({"wgmma.mma_async.sync.aligned.k32.s32.s8.s8", multiply_async<S8, false>, kind});
  all.push_back({"wgmma.mma_async.sync.aligned.k32.s32.s8.s8.registers", multiply_async<S8, true>, kind});
  all.push_back({"wgmma.fence.sync.aligned", product_fence, kind});
  all.push_back({"wgmma.commit_group.sync.aligned", product_commit, kind});
  all.push_back({"wgmma.wait_group.sync.aligned", product_wait, kind});
}

}  // namespace ptx
