// The GPU instructions that kernels are made of, one function each. Under nvcc a function is its PTX
// instruction; under a host compiler it is a call into tests/emulation/emulation.h, which runs a block's
// threads as fibers, so that a kernel can be tested, and its mistakes shown, without a GPU.
// Addresses in shared memory are 32-bit numbers of bytes, as the instructions want them.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "emulation.h"
#endif

namespace vitfast {

// Types of two bytes, by name only: kernels move pairs of them as one uint32_t.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
// Of one byte: a sign, four bits of exponent, three of mantissa, up to 448, NaN and no infinity.
struct e4m3 {
  uint8_t bits;
};

#ifdef __CUDACC__

#define VITFAST_DEVICE __device__ __forceinline__
#define VITFAST_HOST_DEVICE __host__ __device__

// Where the block's dynamic shared memory begins; aligned to 16 bytes.
VITFAST_DEVICE uint32_t shared_begin() {
  extern __shared__ uint4 shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}

VITFAST_DEVICE void block_barrier() { __syncthreads(); }

// Two neighbouring elements, aligned to 4 bytes.
VITFAST_DEVICE uint32_t load_pair(const void* global) { return __ldg(static_cast<const unsigned int*>(global)); }
VITFAST_DEVICE void store_pair(void* global, uint32_t pair) { *static_cast<unsigned int*>(global) = pair; }
VITFAST_DEVICE float load_float(const float* global) { return __ldg(global); }
VITFAST_DEVICE void store_float(float* global, float x) { *global = x; }
// Two neighbouring floats, aligned to 8 bytes.
VITFAST_DEVICE void load_floats(float (&to)[2], const float* global) {
  const float2 both = __ldg(reinterpret_cast<const float2*>(global));
  to[0] = both.x;
  to[1] = both.y;
}
VITFAST_DEVICE void store_floats(float* global, float first, float second) {
  *reinterpret_cast<float2*>(global) = make_float2(first, second);
}

// Starts to copy 16 bytes, both ends aligned to 16; zeros, and nothing is read, unless `valid`.
VITFAST_DEVICE void copy_async(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes a group of the copies this thread has started.
VITFAST_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last `pending` groups of this thread are there, for this thread to see.
template <int pending>
VITFAST_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of two-byte elements: lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i.
// Lane l gets elements 2 (l % 4) and the next of row l / 4, or of column l / 4 if transposed.
VITFAST_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared)
               : "memory");
}
VITFAST_DEVICE void load_matrices_transposed(uint32_t (&to)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared)
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = 2 (lane % 4), a lane holds
//   a: (g, t) (g + 8, t) (g, t + 8) (g + 8, t + 8), each with its right-hand neighbour
//   b: (t, g) (t + 8, g), each with the element below
//   c: (g, t) (g, t + 1) (g + 8, t) (g + 8, t + 1)
VITFAST_DEVICE void multiply_add(bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
VITFAST_DEVICE void multiply_add(fp16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x of the lane whose number differs in the bits of `mask`.
VITFAST_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
VITFAST_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// The larger one, or NaN if one is.
VITFAST_DEVICE float max_or_nan(float x, float y) {
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(y));
  return x;
}

// 2^x, to about 2 ulp; 0 for -inf.
VITFAST_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, to an ulp, and 1 / sqrt(x), to 2^-22.9 of it; x is neither tiny nor huge.
VITFAST_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VITFAST_DEVICE float rsqrt_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh, to a relative error of 2^-11.
VITFAST_DEVICE float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Both rounded to nearest even, `low` in the low half.
VITFAST_DEVICE uint32_t pack(bf16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
VITFAST_DEVICE uint32_t pack(fp16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// In the lower half; beyond 448 it is 448. From sm_89 on.
VITFAST_DEVICE uint32_t pack(e4m3, float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
// By mov, not __uint_as_float: an array that gets floats made of integers becomes one of integers to the compiler, and
// products of wgmma into it then wait for each other.
VITFAST_DEVICE void unpack(bf16, uint32_t pair, float& low, float& high) {
  asm("mov.b32 %0, %1;" : "=f"(low) : "r"(pair << 16));
  asm("mov.b32 %0, %1;" : "=f"(high) : "r"(pair & 0xffff0000u));
}
VITFAST_DEVICE void unpack(fp16, uint32_t pair, float& low, float& high) {
  asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

#else

#define VITFAST_DEVICE inline
#define VITFAST_HOST_DEVICE
#define __global__
#define __launch_bounds__(...)
#define threadIdx (emulation::thread().index)
#define blockIdx (emulation::thread().block_index)

inline uint32_t shared_begin() { return emulation::thread().block.begin; }
inline void block_barrier() { emulation::thread().barrier(); }
inline uint32_t load_pair(const void* global) { return emulation::thread().load_pair(global); }
inline void store_pair(void* global, uint32_t pair) { emulation::thread().store_pair(global, pair); }
inline float load_float(const float* global) { return emulation::thread().load_float(global); }
inline void store_float(float* global, float x) { emulation::thread().store_float(global, x); }
inline void load_floats(float (&to)[2], const float* global) { emulation::thread().load_floats(to, global); }
inline void store_floats(float* global, float first, float second) {
  emulation::thread().store_floats(global, first, second);
}
inline void copy_async(uint32_t shared, const void* global, bool valid) {
  emulation::thread().copy_async(shared, global, valid);
}
inline void copy_commit() { emulation::thread().copy_commit(); }
template <int pending>
void copy_wait() {
  emulation::thread().copy_wait(pending);
}
inline void load_matrices(uint32_t (&to)[4], uint32_t shared) { emulation::thread().load_matrices(to, shared, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t shared) {
  emulation::thread().load_matrices(to, shared, true);
}
inline void multiply_add(bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::thread().multiply_add(&emulation::from_bf16, c, a, b0, b1);
}
inline void multiply_add(fp16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::thread().multiply_add(&emulation::from_fp16, c, a, b0, b1);
}
inline float shuffle_xor(float x, int mask) { return emulation::thread().shuffle_xor(x, mask); }
inline uint32_t shuffle_xor(uint32_t x, int mask) { return emulation::thread().shuffle_xor(x, mask); }
inline float max_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y); }
inline float exp2_fast(float x) { return std::exp2(x); }
// Off by as much as the instruction may be, up or down by the last bit of x.
inline double off_by(double most, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return 1.0 + (bits % 2 ? most : -most);
}
inline float reciprocal_fast(float x) { return static_cast<float>(off_by(0x1p-24, x) / x); }
inline float rsqrt_fast(float x) { return static_cast<float>(off_by(1.28e-7, x) / std::sqrt(static_cast<double>(x))); }
inline float tanh_fast(float x) {
  const float y = static_cast<float>(std::tanh(x) * off_by(0x1p-11, x));
  return std::isnan(y) ? y : std::fmax(-1.0f, std::fmin(1.0f, y));
}
inline uint32_t pack(bf16, float low, float high) {
  return emulation::to_bf16(low) | static_cast<uint32_t>(emulation::to_bf16(high)) << 16;
}
inline uint32_t pack(fp16, float low, float high) {
  return emulation::to_fp16(low) | static_cast<uint32_t>(emulation::to_fp16(high)) << 16;
}
inline uint32_t pack(e4m3, float low, float high) {
  return emulation::to_e4m3(low) | static_cast<uint32_t>(emulation::to_e4m3(high)) << 8;
}
inline void unpack(bf16, uint32_t pair, float& low, float& high) {
  low = emulation::from_bf16(static_cast<uint16_t>(pair));
  high = emulation::from_bf16(static_cast<uint16_t>(pair >> 16));
}
inline void unpack(fp16, uint32_t pair, float& low, float& high) {
  low = emulation::from_fp16(static_cast<uint16_t>(pair));
  high = emulation::from_fp16(static_cast<uint16_t>(pair >> 16));
}

#endif

}  // namespace vitfast
