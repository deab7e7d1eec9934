// Products of a warpgroup (wgmma) as attention wants them, beside those of hopper.cuh: of other widths, and with the
// first operand in registers and the second transposed. One function each, with the bodies that hopper.cuh has.
#pragma once

#include "hopper.cuh"

namespace vitfast {

// Describes to wgmma a second operand [k, n] whose n columns, not the inner axis, lie along rows of 128 bytes,
// swizzled, eight rows in 1024 bytes: 64 columns at `begin`, a multiple of 1024, the next 64 `box` bytes on.
VITFAST_HOST_DEVICE constexpr uint64_t operand_transposed(uint32_t begin, uint32_t box) {
  constexpr uint64_t eight_rows = 1024, swizzle_128 = 1;
  return (begin & 0x3ffff) >> 4 | uint64_t{box >> 4} << 16 | (eight_rows >> 4) << 32 | swizzle_128 << 62;
}

// The same operand `bytes` further on. To the compiler one addition, so that descriptors do not fill the registers.
VITFAST_HOST_DEVICE constexpr uint64_t further(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

// Some of the sums of an array, as the array that a product takes.
template <int from, int count, int all>
VITFAST_DEVICE float (&part(float (&sums)[all])) [count] {
  static_assert(from + count <= all);
  return reinterpret_cast<float (&)[count]>(sums[from]);
}

#ifdef __CUDACC__

// Lists for the instruction, which names every sum: VITFAST_SUMS_8(i) are eight outputs from sums[i], VITFAST_N4(d) is
// "%d0, %d1, %d2, %d3".
#define VITFAST_SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define VITFAST_SUMS_8(i) VITFAST_SUMS_4(i), VITFAST_SUMS_4(i + 4)
#define VITFAST_SUMS_16(i) VITFAST_SUMS_8(i), VITFAST_SUMS_8(i + 8)
#define VITFAST_SUMS_32(i) VITFAST_SUMS_16(i), VITFAST_SUMS_16(i + 16)
#define VITFAST_SUMS_64(i) VITFAST_SUMS_32(i), VITFAST_SUMS_32(i + 32)
#define VITFAST_N2(d) "%" #d "0, %" #d "1"
#define VITFAST_N4(d) VITFAST_N2(d) ", %" #d "2, %" #d "3"
#define VITFAST_N6(d) VITFAST_N4(d) ", %" #d "4, %" #d "5"
#define VITFAST_N8(d) VITFAST_N6(d) ", %" #d "6, %" #d "7"
#define VITFAST_N10(d) VITFAST_N8(d) ", %" #d "8, %" #d "9"
#define VITFAST_30 VITFAST_N10() ", " VITFAST_N10(1) ", " VITFAST_N10(2) ", "
#define VITFAST_60 VITFAST_30 VITFAST_N10(3) ", " VITFAST_N10(4) ", " VITFAST_N10(5) ", "
#define VITFAST_90 VITFAST_60 VITFAST_N10(6) ", " VITFAST_N10(7) ", " VITFAST_N10(8) ", "

// sums [64, n] = a [64, 16] b [n, 16]^T, plus sums if `add`: like those of hopper.cuh, n up to the keys of attention.
#define VITFAST_PRODUCT(type, name, n, names, a_name, b_name, add_name, ...)                                         \
  VITFAST_DEVICE void multiply_add_async(type, float (&sums)[n / 2], uint64_t a, uint64_t b, bool add) {             \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                                                    \
                 ", 0;\n"                                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" names "}, " a_name ", " b_name \
                 ", add, 1, 1, 0, 0;\n}"                                                                             \
                 : __VA_ARGS__                                                                                       \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add))                                                        \
                 : "memory");                                                                                        \
  }
#define VITFAST_PRODUCTS(type, name)                                                                      \
  VITFAST_PRODUCT(type, name, 64, VITFAST_30 VITFAST_N2(3), "%32", "%33", "%34", VITFAST_SUMS_32(0))      \
  VITFAST_PRODUCT(type, name, 136, VITFAST_60 VITFAST_N8(6), "%68", "%69", "%70", VITFAST_SUMS_64(0),     \
                  VITFAST_SUMS_4(64))                                                                     \
  VITFAST_PRODUCT(type, name, 160, VITFAST_60 VITFAST_N10(6) ", " VITFAST_N10(7), "%80", "%81", "%82",    \
                  VITFAST_SUMS_64(0), VITFAST_SUMS_16(64))                                                \
  VITFAST_PRODUCT(type, name, 200, VITFAST_90 VITFAST_N10(9), "%100", "%101", "%102", VITFAST_SUMS_64(0), \
                  VITFAST_SUMS_32(64), VITFAST_SUMS_4(96))                                                \
  VITFAST_PRODUCT(type, name, 208, VITFAST_90 VITFAST_N10(9) ", " VITFAST_N4(10), "%104", "%105", "%106", \
                  VITFAST_SUMS_64(0), VITFAST_SUMS_32(64), VITFAST_SUMS_8(96))
VITFAST_PRODUCTS(bf16, "bf16") VITFAST_PRODUCTS(fp16, "f16")

// sums [64, n] = a [64, 16] b [16, n], plus sums if `add`; b as `operand_transposed` describes it. A lane of warp w has
// of a, with g = lane / 4 and t = 2 (lane % 4), as the other warp products have it,
//   (16 w + g, t) (16 w + g + 8, t) (16 w + g, t + 8) (16 w + g + 8, t + 8), each with its right-hand neighbour.
// a is written before product_fence, and not again before product_wait.
#define VITFAST_TRANSPOSED(type, name, n, names, a_names, b_name, add_name, ...)                                \
  VITFAST_DEVICE void multiply_transposed_async(type, float (&sums)[n / 2], const uint32_t (&a)[4], uint64_t b, \
                                                bool add) {                                                     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                                               \
                 ", 0;\n"                                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" names "}, {" a_names      \
                 "}, " b_name ", add, 1, 1, 1;\n}"                                                              \
                 : __VA_ARGS__                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add))               \
                 : "memory");                                                                                   \
  }
#define VITFAST_TRANSPOSEDS(type, name)                                                                                \
  VITFAST_TRANSPOSED(type, name, 32, VITFAST_N10() ", " VITFAST_N6(1), "%16, %17, %18, %19", "%20", "%21",             \
                     VITFAST_SUMS_16(0))                                                                               \
  VITFAST_TRANSPOSED(type, name, 64, VITFAST_30 VITFAST_N2(3), "%32, %33, %34, %35", "%36", "%37", VITFAST_SUMS_32(0)) \
  VITFAST_TRANSPOSED(type, name, 72, VITFAST_30 VITFAST_N6(3), "%36, %37, %38, %39", "%40", "%41", VITFAST_SUMS_32(0), \
                     VITFAST_SUMS_4(32))                                                                               \
  VITFAST_TRANSPOSED(type, name, 80, VITFAST_30 VITFAST_N10(3), "%40, %41, %42, %43", "%44", "%45",                    \
                     VITFAST_SUMS_32(0), VITFAST_SUMS_8(32))                                                           \
  VITFAST_TRANSPOSED(type, name, 88, VITFAST_30 VITFAST_N10(3) ", " VITFAST_N4(4), "%44, %45, %46, %47", "%48", "%49", \
                     VITFAST_SUMS_32(0), VITFAST_SUMS_8(32), VITFAST_SUMS_4(40))                                       \
  VITFAST_TRANSPOSED(type, name, 96, VITFAST_30 VITFAST_N10(3) ", " VITFAST_N8(4), "%48, %49, %50, %51", "%52", "%53", \
                     VITFAST_SUMS_32(0), VITFAST_SUMS_16(32))                                                          \
  VITFAST_TRANSPOSED(type, name, 104, VITFAST_30 VITFAST_N10(3) ", " VITFAST_N10(4) ", " VITFAST_N2(5),                \
                     "%52, %53, %54, %55", "%56", "%57", VITFAST_SUMS_32(0), VITFAST_SUMS_16(32), VITFAST_SUMS_4(48))  \
  VITFAST_TRANSPOSED(type, name, 128, VITFAST_60 VITFAST_N4(6), "%64, %65, %66, %67", "%68", "%69", VITFAST_SUMS_64(0))
    VITFAST_TRANSPOSEDS(bf16, "bf16") VITFAST_TRANSPOSEDS(fp16, "f16")

#undef VITFAST_SUMS_4
#undef VITFAST_SUMS_8
#undef VITFAST_SUMS_16
#undef VITFAST_SUMS_32
#undef VITFAST_SUMS_64
#undef VITFAST_N2
#undef VITFAST_N4
#undef VITFAST_N6
#undef VITFAST_N8
#undef VITFAST_N10
#undef VITFAST_30
#undef VITFAST_60
#undef VITFAST_90
#undef VITFAST_PRODUCT
#undef VITFAST_PRODUCTS
#undef VITFAST_TRANSPOSED
#undef VITFAST_TRANSPOSEDS

#else

// hopper.cuh has products of any width.
template <int count>
void multiply_transposed_async(bf16, float (&sums)[count], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulation::multiply_transposed_async(&emulation::from_bf16, 2 * count, sums, a, b, add);
}
template <int count>
void multiply_transposed_async(fp16, float (&sums)[count], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulation::multiply_transposed_async(&emulation::from_fp16, 2 * count, sums, a, b, add);
}

#endif

}  // namespace vitfast
