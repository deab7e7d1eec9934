// The instructions that came with sm_90: barriers in shared memory, the tensor memory accelerator (TMA), products of a
// warpgroup (wgmma), and registers that change hands. As in atoms.cuh a function is one instruction, with a body for
// nvcc and one for tests/emulation/hopper.h. wgmma and setmaxnreg exist on sm_90a alone: sm_100 has other ones in
// their place (tcgen05). A kernel that uses them keeps its body inside #ifdef VITFAST_SM_90A.
//
// Blocks of a cluster run at the same time on neighbouring multiprocessors, and reach each other's shared memory: TMA
// writes to several of them at once, and an mbarrier takes arrivals from all.
//
// Source: the PTX ISA, 9.7.13.15 (mbarrier), 9.7.13.4 (barrier.cluster), 9.7.9.23 (mapa), 9.7.9.27
// (cp.async.bulk.tensor), 9.7.15.5 (wgmma) and 5.5.7 (swizzles).
#pragma once

#include "atoms.cuh"
#include "tensor_map.h"

#ifndef __CUDACC__
#include "hopper.h"
#endif

#if !defined(__CUDACC__) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VITFAST_SM_90A
#endif

namespace vitfast {

// The 128-byte swizzle: of a row of 128 bytes, which begins at a multiple of 128, the order of the 8 chunks of 16 bytes
// is permuted by the row's number. It acts on bits of the address, so a tile begins at a multiple of 1024.
VITFAST_HOST_DEVICE constexpr uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Describes to wgmma an operand in shared memory: rows of 128 bytes, swizzled, eight of them in 1024 bytes, the
// product's inner axis along the row. `begin` is a multiple of 1024, plus 32 for each product along the row.
VITFAST_HOST_DEVICE constexpr uint64_t operand(uint32_t begin) {
  constexpr uint64_t eight_rows = 1024, swizzle_128 = 1;
  return (begin & 0x3ffff) >> 4 | uint64_t{1} << 16 | (eight_rows >> 4) << 32 | swizzle_128 << 62;
}

// Stages of shared memory in turn; `parity` is that of the phases in which this round fills and empties them.
template <int stages>
struct Ring {
  int stage = 0, parity = 0;
  VITFAST_DEVICE void next() {
    stage = stage + 1 == stages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

#ifdef __CUDACC__

// Of a kernel: its blocks run in clusters of so many, consecutive ones. Elsewhere than on sm_90a there is no body.
#ifdef VITFAST_SM_90A
#define VITFAST_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define VITFAST_CLUSTER(blocks)
#endif

VITFAST_DEVICE int grid_size() { return gridDim.x; }

// mbarrier: eight bytes of shared memory. A phase ends when `count` arrivals and all expected bytes have come; then the
// next begins. Phases are told apart by their parity: the first has 0.
VITFAST_DEVICE void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
VITFAST_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and has the phase wait for `bytes` that copies will bring.
VITFAST_DEVICE void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the current phase, if its parity is `parity`; else the phase before has ended: no wait.
VITFAST_DEVICE void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Where `shared`, an address of this block, lies in block `block` of the cluster, as all of the cluster know it.
VITFAST_DEVICE uint32_t address_in_cluster(uint32_t shared, int block) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(block));
  return address;
}
// Arrives at an mbarrier of any block of the cluster, at an address in the cluster. It tells of what was read, not of
// what was written: releasing writes to another block would be a fence of the whole GPU (MEMBAR.ALL.GPU).
VITFAST_DEVICE void mbarrier_arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits for all threads of the cluster.
VITFAST_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// What this thread wrote to shared memory, mbarriers too, is seen by TMA and wgmma after this.
VITFAST_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits for `threads`, whole warps, at the barrier `id`, 1 .. 15; block_barrier has 0.
VITFAST_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The map's box at (row, column) to shared memory, zeros beyond the matrix; `barrier` counts its bytes, all of them.
VITFAST_DEVICE void tile_load(uint32_t shared, const TensorMap& map, int row, int column, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// The same for all blocks of the cluster whose bits are set in `blocks`: to the place that `shared` is in each of them,
// where the mbarrier that lies as `barrier` does counts the bytes.
VITFAST_DEVICE void tile_load_multicast(uint32_t shared, const TensorMap& map, int row, int column, uint32_t barrier,
                                        uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}
// The other way; nothing is written beyond the matrix. Groups are this thread's own, as those of copy_async.
VITFAST_DEVICE void tile_store(const TensorMap& map, int row, int column, uint32_t shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
               "r"(column), "r"(row), "r"(shared)
               : "memory");
}
// The same two for a map of Heads: rows of one head of an image.
VITFAST_DEVICE void tile_load(uint32_t shared, const TensorMap& map, int image, int row, int head, int column,
                              uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared),
      "l"(&map), "r"(column), "r"(head), "r"(row), "r"(image), "r"(barrier)
      : "memory");
}
VITFAST_DEVICE void tile_store(const TensorMap& map, int image, int row, int head, int column, uint32_t shared) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
               "r"(column), "r"(head), "r"(row), "r"(image), "r"(shared)
               : "memory");
}
VITFAST_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until this thread's stores have read shared memory, but for the last `pending` groups.
template <int pending>
VITFAST_DEVICE void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Two neighbouring elements in shared memory.
VITFAST_DEVICE uint32_t load_shared_pair(uint32_t shared) {
  uint32_t pair;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(shared) : "memory");
  return pair;
}
VITFAST_DEVICE void store_shared_pair(uint32_t shared, uint32_t pair) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(pair) : "memory");
}

// Registers per thread of this warpgroup, from now on: fewer, or as many more as others have given back.
template <int registers>
VITFAST_DEVICE void give_registers() {
#ifdef VITFAST_SM_90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}
template <int registers>
VITFAST_DEVICE void take_registers() {
#ifdef VITFAST_SM_90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

// Before the first product, and wherever other code has touched the sums.
VITFAST_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
VITFAST_DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the last `pending` groups of products: before it the sums, and the operands' memory, are theirs.
template <int pending>
VITFAST_DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// sums [64, n] = a [64, 16] b [n, 16]^T, plus sums if `add`, by the four warps of a warpgroup; see `operand` for a and
// b. With g = lane / 4 and t = 2 (lane % 4), sums[4 j .. 4 j + 3] of a lane of warp w are
//   (16 w + g, 8 j + t) (16 w + g, 8 j + t + 1) (16 w + g + 8, 8 j + t) (16 w + g + 8, 8 j + t + 1).
// The instruction names every sum: the macros write "%0, ... %127" and its operands.
#define VITFAST_16(x, i)                                                                                     \
  x(i), x(i + 1), x(i + 2), x(i + 3), x(i + 4), x(i + 5), x(i + 6), x(i + 7), x(i + 8), x(i + 9), x(i + 10), \
      x(i + 11), x(i + 12), x(i + 13), x(i + 14), x(i + 15)
#define VITFAST_64(x, i) VITFAST_16(x, i), VITFAST_16(x, i + 16), VITFAST_16(x, i + 32), VITFAST_16(x, i + 48)
#define VITFAST_SUM(i) "+f"(sums[i])
#define VITFAST_TEN(d) \
  "%" #d "0, %" #d "1, %" #d "2, %" #d "3, %" #d "4, %" #d "5, %" #d "6, %" #d "7, %" #d "8, %" #d "9, "
#define VITFAST_60 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " VITFAST_TEN(1) VITFAST_TEN(2) VITFAST_TEN(3) VITFAST_TEN(4) VITFAST_TEN(5)
#define VITFAST_120 \
  VITFAST_60 VITFAST_TEN(6) VITFAST_TEN(7) VITFAST_TEN(8) VITFAST_TEN(9) VITFAST_TEN(10) VITFAST_TEN(11)
#define VITFAST_PRODUCT(type, name, n, list, outputs, a_index, b_index, add_index)                         \
  VITFAST_DEVICE void multiply_add_async(type, float (&sums)[n / 2], uint64_t a, uint64_t b, bool add) {   \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_index                                       \
                 ", 0;\n"                                                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" list "}, %" #a_index \
                 ", %" #b_index ", add, 1, 1, 0, 0;\n}"                                                    \
                 : outputs                                                                                 \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add))                                              \
                 : "memory");                                                                              \
  }
#define VITFAST_PRODUCTS(type, name)                                                                        \
  VITFAST_PRODUCT(type, name, 128, VITFAST_60 "%60, %61, %62, %63", VITFAST_64(VITFAST_SUM, 0), 64, 65, 66) \
  VITFAST_PRODUCT(type, name, 256, VITFAST_120 "%120, %121, %122, %123, %124, %125, %126, %127",            \
                  VITFAST_64(VITFAST_SUM, 0) VITFAST_COMMA VITFAST_64(VITFAST_SUM, 64), 128, 129, 130)
#define VITFAST_COMMA ,
VITFAST_PRODUCTS(bf16, "bf16")
VITFAST_PRODUCTS(fp16, "f16")
// As above, but a [64, 32] b [128, 32]^T. The tensor cores keep 14 bits of such a sum.
VITFAST_DEVICE void multiply_add_async(e4m3, float (&sums)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" VITFAST_60
      "%60, %61, %62, %63}, %64, %65, add, 1, 1;\n}"
      : VITFAST_64(VITFAST_SUM, 0)
      : "l"(a), "l"(b), "r"(static_cast<int>(add))
      : "memory");
}
#undef VITFAST_16
#undef VITFAST_64
#undef VITFAST_SUM
#undef VITFAST_TEN
#undef VITFAST_60
#undef VITFAST_120
#undef VITFAST_PRODUCT
#undef VITFAST_PRODUCTS
#undef VITFAST_COMMA

#else

#define __grid_constant__
#define VITFAST_CLUSTER(blocks)

inline int grid_size() { return static_cast<int>(emulation::thread().grid_size); }
inline void mbarrier_init(uint32_t barrier, int count) { emulation::mbarrier_init(barrier, count); }
inline void mbarrier_arrive(uint32_t barrier) { emulation::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) { emulation::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint32_t barrier, int parity) { emulation::mbarrier_wait(barrier, parity); }
inline uint32_t address_in_cluster(uint32_t shared, int block) { return emulation::address_in_cluster(shared, block); }
inline void mbarrier_arrive_in_cluster(uint32_t barrier) { emulation::mbarrier_arrive_in_cluster(barrier); }
inline void cluster_barrier() { emulation::thread().cluster_barrier(); }
inline void async_fence() { emulation::async_fence(); }
inline void named_barrier(int id, int threads) { emulation::thread().barrier(id, threads); }
inline void tile_load(uint32_t shared, const TensorMap& map, int row, int column, uint32_t barrier) {
  emulation::tile_load(shared, map, row, column, barrier);
}
inline void tile_load_multicast(uint32_t shared, const TensorMap& map, int row, int column, uint32_t barrier,
                                uint16_t blocks) {
  emulation::tile_load_multicast(shared, map, row, column, barrier, blocks);
}
inline void tile_store(const TensorMap& map, int row, int column, uint32_t shared) {
  emulation::tile_store(map, row, column, shared);
}
inline void tile_load(uint32_t shared, const TensorMap& map, int image, int row, int head, int column,
                      uint32_t barrier) {
  emulation::tile_load(shared, map, image, row, head, column, barrier);
}
inline void tile_store(const TensorMap& map, int image, int row, int head, int column, uint32_t shared) {
  emulation::tile_store(map, image, row, head, column, shared);
}
inline void store_commit() { emulation::store_commit(); }
template <int pending>
void store_wait_read() {
  emulation::store_wait_read(pending);
}
inline uint32_t load_shared_pair(uint32_t shared) { return emulation::thread().load_shared_pair(shared); }
inline void store_shared_pair(uint32_t shared, uint32_t pair) { emulation::thread().store_shared_pair(shared, pair); }
template <int registers>
void give_registers() {
  emulation::set_registers(registers, false);
}
template <int registers>
void take_registers() {
  emulation::set_registers(registers, true);
}
inline void product_fence() { emulation::product_fence(); }
inline void product_commit() { emulation::product_commit(); }
template <int pending>
void product_wait() {
  emulation::product_wait(pending);
}
template <int count>
void multiply_add_async(bf16, float (&sums)[count], uint64_t a, uint64_t b, bool add) {
  static_assert(count % 4 == 0 && count <= 128);
  emulation::multiply_add_async(&emulation::from_bf16, 2 * count, sums, a, b, add);
}
template <int count>
void multiply_add_async(fp16, float (&sums)[count], uint64_t a, uint64_t b, bool add) {
  static_assert(count % 4 == 0 && count <= 128);
  emulation::multiply_add_async(&emulation::from_fp16, 2 * count, sums, a, b, add);
}
inline void multiply_add_async(e4m3, float (&sums)[64], uint64_t a, uint64_t b, bool add) {
  emulation::multiply_add_async(&emulation::from_e4m3, 128, sums, a, b, add);
}

#endif

}  // namespace vitfast
