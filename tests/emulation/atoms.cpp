// Single instructions, and kernels with one mistake each, under emulation, as a library for ctypes.

#include "device/atoms.cuh"

#include <iterator>

namespace {

using namespace vitfast;
using emulation::thread;

uint16_t g_input[64];  // what the kernels below may read
uint32_t g_output[32];

// Copies 16 bytes for every thread, to the address that is its number times 16.
void copy_all() {
  copy_async(16 * threadIdx.x, g_input, true);
  copy_commit();
}

void read_neighbour() {
  uint32_t to[4];
  load_matrices(to, 16 * ((threadIdx.x + 1) % 32));
}

struct Mistake {
  const char* name;
  void (*kernel)();
};

const Mistake kMistakes[] = {
    {"none",
     [] {
       copy_all();
       copy_wait<0>();
       block_barrier();
       read_neighbour();
       store_pair(&g_output[threadIdx.x], load_pair(g_input));
     }},
    {"no barrier",
     [] {
       copy_all();
       copy_wait<0>();
       read_neighbour();
     }},
    {"no barrier before writing again",
     [] {
       copy_all();
       copy_wait<0>();
       block_barrier();
       read_neighbour();
       copy_all();
       copy_wait<0>();
     }},
    {"no wait",
     [] {
       copy_all();
       block_barrier();
       read_neighbour();
     }},
    {"waits for the wrong group",
     [] {
       copy_all();
       copy_wait<1>();
       block_barrier();
       read_neighbour();
     }},
    {"copies in no group", [] { copy_async(16 * threadIdx.x, g_input, true); }},
    {"reads what nobody wrote", [] { read_neighbour(); }},
    {"two threads write one place",
     [] {
       copy_async(0, g_input, true);
       copy_commit();
       copy_wait<0>();
     }},
    {"shared address beyond the end",
     [] {
       copy_async(16 * threadIdx.x + 16, g_input, true);
       copy_commit();
     }},
    {"shared address not aligned",
     [] {
       copy_async(16 * threadIdx.x + 4, g_input, true);
       copy_commit();
     }},
    {"global address not aligned", [] { load_pair(g_input + 1); }},
    {"reads beyond the input", [] { load_pair(g_input + 64); }},
    {"writes the input", [] { store_pair(g_input, 0); }},
    {"lanes part", [] { threadIdx.x < 5 ? void(shuffle_xor(1.0f, 1)) : read_neighbour(); }},
    {"a lane leaves",
     [] {
       if (threadIdx.x != 3) shuffle_xor(1.0f, 1);
     }},
    {"a thread skips the barrier",
     [] {
       if (threadIdx.x != 3) block_barrier();
     }},
};

template <typename F>
const char* guarded(F f) {
  static std::string message;
  try {
    f();
    return "";
  } catch (const emulation::Trap& trap) {
    message = trap.what();
    return message.c_str();
  }
}

emulation::Block warp(uint64_t seed) {
  return emulation::Block(32, 32 * 16, {{g_input, sizeof(g_input), false}, {g_output, sizeof(g_output), true}}, seed);
}

}  // namespace

// The names of the mistakes; "" after the last.
extern "C" const char* mistake_name(int i) {
  return i < static_cast<int>(std::size(kMistakes)) ? kMistakes[i].name : "";
}
extern "C" const char* mistake(int i, uint64_t seed) {
  return guarded([&] { warp(seed).run({}, kMistakes[i].kernel); });
}

// Registers as [lane][register].
extern "C" const char* multiply_add(bool is_bf16, float (*c)[4], const uint32_t (*a)[4], const uint32_t (*b)[2]) {
  return guarded([&] {
    warp(0).run({}, [=] {
      const unsigned i = threadIdx.x;
      if (is_bf16) vitfast::multiply_add(bf16{}, c[i], a[i], b[i][0], b[i][1]);
      if (!is_bf16) vitfast::multiply_add(fp16{}, c[i], a[i], b[i][0], b[i][1]);
    });
  });
}

// `rows` [32, 8]: row i is what lane i points to. The number of bank conflicts in `conflicts`.
extern "C" const char* load_matrices(const uint16_t (*rows)[8], bool transposed, int stride, uint32_t (*out)[4],
                                     int64_t* conflicts) {
  return guarded([&] {
    emulation::Block block(32, 32 * stride, {{rows, 32 * 16, false}}, 0);
    block.run({}, [=] {
      const unsigned i = threadIdx.x;
      copy_async(stride * i, rows[i], true);
      copy_commit();
      copy_wait<0>();
      block_barrier();
      if (transposed) load_matrices_transposed(out[i], stride * i);
      if (!transposed) vitfast::load_matrices(out[i], stride * i);
    });
    *conflicts = block.bank_conflicts;
  });
}

extern "C" const char* shuffle_xor(float* x, int mask) {
  return guarded([&] { warp(0).run({}, [=] { x[threadIdx.x] = vitfast::shuffle_xor(x[threadIdx.x], mask); }); });
}

extern "C" uint32_t pack_bf16(float low, float high) { return pack(bf16{}, low, high); }
extern "C" uint32_t pack_fp16(float low, float high) { return pack(fp16{}, low, high); }
extern "C" uint32_t pack_e4m3(float low, float high) { return pack(e4m3{}, low, high); }
extern "C" float max_of(float x, float y) { return max_or_nan(x, y); }
