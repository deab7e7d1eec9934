// The instructions of sm_90 under emulation, as a library for ctypes: single ones, and a small pipeline of all of them
// that can be given one mistake.

#include <string>
#include <utility>

#include "device/products.cuh"

namespace {

using namespace vitfast;

std::string g_mistake;
bool mistaken(const char* what) { return g_mistake == what; }

// y [64, 128] = x [64, K] w [128, K]^T in bf16, K in steps of 64 through two stages: a warpgroup multiplies, and a
// thread of the next one copies.
constexpr int kStages = 2, kX = 64 * 128, kW = 128 * 128, kStage = kX + kW, kY = 2 * 64 * 128;
constexpr int kBytes = 1024 + kStages * kStage + kY + 8 * (2 * kStages);

void pipeline(const TensorMap& x, const TensorMap& w, const TensorMap& y, int steps) {
  const uint32_t begin = (shared_begin() + 1023) / 1024 * 1024, stages = begin, out = stages + kStages * kStage;
  const uint32_t full = out + kY, empty = full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + 8 * i, mistaken("two arrivals where one comes") ? 2 : 1);
      mbarrier_init(empty + 8 * i, 4);
    }
    if (!mistaken("TMA has not seen the mbarriers")) async_fence();
  }
  if (!mistaken("mbarriers used before all know of them")) block_barrier();

  if (threadIdx.x >= 128) {
    give_registers<24>();
    if (threadIdx.x != 128) return;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages, round = step / kStages;
      const uint32_t to = stages + stage * kStage, barrier = full + 8 * stage;
      if (!mistaken("stage filled before it is empty")) {
        mbarrier_wait(empty + 8 * stage, mistaken("waits for the wrong phase to fill") ? round % 2 : 1 - round % 2);
      }
      const int wrong = mistaken("expects too few bytes") ? -kX : mistaken("expects too many bytes") ? kX : 0;
      mbarrier_arrive_expect(barrier, kStage + wrong);
      tile_load(to + (mistaken("tile off its swizzle") ? 128 : 0), x, 0, 64 * step, barrier);
      tile_load(to + kX, w, 0, 64 * step, barrier);
    }
    return;
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  mistaken("takes registers that nobody gave") ? take_registers<256>() : take_registers<152>();
  float sums[64] = {};
  const int count = mistaken("a step too many") ? steps + 1 : mistaken("a step too few") ? steps - 1 : steps;
  for (int step = 0; step < count; ++step) {
    const int stage = step % kStages, parity = step / kStages % 2;
    const uint32_t a = stages + stage * kStage, b = a + kX;
    const auto release = [&] {
      if (lane == 0) mbarrier_arrive(empty + 8 * stage);
    };
    if (!mistaken("no wait for the copies")) {
      mbarrier_wait(full + 8 * stage, mistaken("waits for the wrong phase to multiply") ? 1 - parity : parity);
    }
    if (!mistaken("no product_fence")) product_fence();
    if (mistaken("stage released before its products are done")) release();
    for (int k = 0; k < 4; ++k) {
      uint64_t left = operand(a + 32 * k), right = operand(b + 32 * k);
      if (mistaken("swizzle of 64 bytes")) left ^= uint64_t{3} << 62;
      if (mistaken("no swizzle")) right &= ~(uint64_t{3} << 62);
      if (mistaken("stride of four rows")) right ^= uint64_t{64 ^ 32} << 32;
      if (mistaken("inner axis not advanced")) left = operand(a);
      if (mistaken("warps want different products") && warp == 1) left = operand(a + 32 * (3 - k));
      multiply_add_async(bf16{}, sums, left, right, step + k > (mistaken("sums begin anew too late") ? 1 : 0));
      if (mistaken("sums touched under way")) sums[0] = 0.0f;
    }
    product_commit();
    if (!mistaken("sums read before the wait") || step + 1 < count) product_wait<0>();
    if (!mistaken("stage released before its products are done")) release();
  }

  // Element (row, column) of y is at `swizzle` of its place in a box of 64 columns.
  const int row = 16 * warp + lane / 4, pair = 2 * (lane % 4);
  for (int j = 0; j < 16; ++j) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t place = out + j / 8 * 8192 + (row + 8 * half) * 128 + j % 8 * 16 + 2 * pair;
      const uint32_t at = mistaken("y not swizzled") ? place : swizzle(place);
      store_shared_pair(at, pack(bf16{}, sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]));
    }
  }
  if (!mistaken("y stored with no async_fence")) async_fence();
  if (!mistaken("y stored before all have written")) {
    named_barrier(1, mistaken("a barrier of another size") && warp == 2 ? 96 : 128);
  }
  if (threadIdx.x == 0) {
    tile_store(y, 0, 0, out);
    tile_store(y, 0, 64, out + 8192);
    if (!mistaken("stores in no group")) store_commit();
    if (!mistaken("ends before y is read")) store_wait_read<0>();
  }
  if (mistaken("y written again too early")) store_shared_pair(out + 4 * threadIdx.x, 0);
  if (mistaken("sums read before the wait")) product_wait<0>();
}

// Two blocks, a cluster, each copy half of every box [64, 64] of x [64 steps, 64] for both, through two stages. A warp
// of each reads them to its part of y, and a thread of the next one copies.
constexpr int kHalf = 32 * 128, kBox = 2 * kHalf, kBoxBytes = 1024 + kStages * kBox + 8 * 2 * kStages;

void shared_boxes(const TensorMap& x, uint32_t* y, int steps) {
  const uint32_t stages = (shared_begin() + 1023) / 1024 * 1024, full = stages + kStages * kBox;
  const uint32_t empty = full + 8 * kStages;
  const int rank = blockIdx.x, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, mistaken("stage empty when one block has read it") ? 32 : 64);
    }
    async_fence();
  }
  mistaken("mbarriers known to their own block alone") ? block_barrier() : cluster_barrier();

  if (threadIdx.x == 32) {
    const int blocks = mistaken("copies for itself alone")                ? 1 << rank
                       : mistaken("copies for the other alone")           ? 2 >> rank
                       : mistaken("copies for a block that is not there") ? 7
                                                                          : 3;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages, round = step / kStages;
      mbarrier_wait(empty + 8 * stage, 1 - round % 2);
      mbarrier_arrive_expect(full + 8 * stage, mistaken("expects its own half") ? kHalf : kBox);
      const int half = mistaken("both halves in one place") ? 0 : rank;
      tile_load_multicast(stages + stage * kBox + half * kHalf, x, 64 * step + 32 * rank, 0, full + 8 * stage,
                          static_cast<uint16_t>(blocks));
    }
  } else if (threadIdx.x < 32) {
    for (int step = 0; step < (mistaken("a block reads a box less") && rank ? steps - 1 : steps); ++step) {
      const int stage = step % kStages;
      mbarrier_wait(full + 8 * stage, step / kStages % 2);
      for (int i = lane; i < kBox / 4; i += 32) {
        store_pair(y + (rank * steps + step) * kBox / 4 + i, load_shared_pair(stages + stage * kBox + 4 * i));
      }
      for (int block = 0; block < 2; ++block) {
        if (mistaken("no arrival at the other block") && block != rank) continue;
        const int at = mistaken("both arrivals at its own block") ? rank : block;
        const uint32_t barrier = address_in_cluster(empty + 8 * stage, at);
        mistaken("arrives as if at its own block") ? mbarrier_arrive(barrier) : mbarrier_arrive_in_cluster(barrier);
      }
    }
  }
  if (!mistaken("ends while the other block arrives")) cluster_barrier();
}

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

}  // namespace

extern "C" const char* run_pipeline(const char* mistake, const void* x, const void* w, void* y, int steps,
                                    uint64_t seed, int64_t* bank_conflicts) {
  return guarded([&] {
    g_mistake = mistake;
    const int k = 64 * steps;
    const TensorMap x_map = emulation::encode({x, 64, k, k, 64, 64}),
                    w_map = emulation::encode({w, 128, k, k, 128, 64});
    const TensorMap y_map = emulation::encode({y, 64, 128, 128, 64, 64});
    const size_t width = static_cast<size_t>(k);
    emulation::Block block(256, kBytes, {{x, 128 * width, false}, {w, 256 * width, false}, {y, 64 * 256, true}}, seed,
                           16);
    emulation::hopper_of(block).registers = 128;
    block.run({}, [&] { pipeline(x_map, w_map, y_map, steps); });
    *bank_conflicts = block.bank_conflicts;
  });
}

extern "C" const char* run_shared_boxes(const char* mistake, const void* x, uint32_t* y, int steps, uint64_t seed) {
  return guarded([&] {
    g_mistake = mistake;
    const TensorMap map = emulation::encode({x, 64 * steps, 64, 64, 32, 64});
    const size_t bytes = static_cast<size_t>(kBox) * steps;
    const std::vector<emulation::Range> ranges{{x, bytes, false}, {y, 2 * bytes, true}};
    emulation::Block first(64, kBoxBytes, ranges, seed, 16), second(64, kBoxBytes, ranges, seed, 16);
    emulation::Block::run_cluster({&first, &second}, {}, [&] { shared_boxes(map, y, steps); }, 2);
  });
}

// One warpgroup to whose shared memory `image` was copied.
template <typename F>
const char* with_image(const void* image, int bytes, F f) {
  return guarded([&] {
    emulation::Block block(128, bytes, {{image, static_cast<size_t>(bytes), false}}, 0);
    block.run({}, [=] {
      for (int i = 16 * threadIdx.x; i < bytes; i += 16 * 128) {
        copy_async(i, static_cast<const char*>(image) + i, true);
      }
      copy_commit();
      copy_wait<0>();
      async_fence();
      block_barrier();
      f();
    });
  });
}

// f(this thread's sums), sums [128][n / 2], for one of the widths that there are.
template <typename F, int... n>
void with_sums(int width, float* sums, F f, std::integer_sequence<int, n...>) {
  const auto of_width = [=](auto count) {
    if (2 * decltype(count)::value != width) return;
    float mine[decltype(count)::value];
    std::memcpy(mine, sums + decltype(count)::value * threadIdx.x, sizeof(mine));
    f(mine);
    std::memcpy(sums + decltype(count)::value * threadIdx.x, mine, sizeof(mine));
  };
  (of_width(std::integral_constant<int, n / 2>()), ...);
}

// a at 0 and b behind it, both as `operand` describes them, of which the product begins `offset` bytes along the rows.
extern "C" const char* product(const char* type, int n, const void* image, int bytes, int offset, bool add,
                               float* sums) {
  return with_image(image, bytes, [=] {
    const auto of = [=](auto type, auto widths) {
      const auto run = [=](auto& mine) {
        product_fence();
        multiply_add_async(type, mine, operand(offset), operand(8192 + offset), add);
        product_commit();
        product_wait<0>();
      };
      with_sums(n, sums, run, widths);
    };
    const std::integer_sequence<int, 64, 128, 136, 200, 256> widths;
    const std::string name = type;
    if (name == "bf16") of(bf16{}, widths);
    if (name == "fp16") of(fp16{}, widths);
    if (name == "e4m3") of(e4m3{}, std::integer_sequence<int, 128>());
  });
}

// b as `operand_transposed` describes it, from `begin` on, and a [128][4] in registers. `mistake`: 1 has them written
// before the wait, 2 leaves out the fence.
extern "C" const char* product_transposed(const char* type, int n, const void* image, int bytes, uint32_t begin,
                                          uint32_t box, const uint32_t (*a)[4], bool add, float* sums, int mistake) {
  return with_image(image, bytes, [=] {
    const auto of = [=](auto type) {
      const auto run = [=](auto& mine) {
        uint32_t registers[4];
        std::memcpy(registers, a[threadIdx.x], sizeof(registers));
        if (mistake != 2) product_fence();
        multiply_transposed_async(type, mine, registers, operand_transposed(begin, box), add);
        product_commit();
        if (mistake == 1) registers[3] = 0;
        product_wait<0>();
      };
      with_sums(n, sums, run, std::integer_sequence<int, 32, 64, 72, 80, 96, 128>());
    };
    if (type == std::string("bf16")) of(bf16{});
    if (type == std::string("fp16")) of(fp16{});
  });
}

// A box of [box_rows, 64] of a matrix, as it lies in shared memory.
extern "C" const char* load_box(const void* matrix, int rows, int columns, int stride, int box_rows, int row,
                                int column, uint32_t* image) {
  return guarded([&] {
    const TensorMap map = emulation::encode({matrix, rows, columns, stride, box_rows, 64});
    const size_t bytes = 2 * static_cast<size_t>((rows - 1) * stride + columns);
    emulation::Block block(32, 128 * box_rows + 8, {{matrix, bytes, false}}, 0);
    block.run({}, [=, &map] {
      const uint32_t barrier = 128 * box_rows;
      if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        async_fence();
        mbarrier_arrive_expect(barrier, 128 * box_rows);
        tile_load(0, map, row, column, barrier);
        mbarrier_wait(barrier, 0);
        for (int i = 0; i < 32 * box_rows; ++i) image[i] = load_shared_pair(4 * i);
      }
    });
  });
}

// The same of [images, rows, heads, columns], contiguous.
extern "C" const char* load_head_box(const void* data, const int* sizes, int box_rows, const int* at, uint32_t* box) {
  return guarded([&] {
    const int64_t images = sizes[0], rows = sizes[1], heads = sizes[2], columns = sizes[3];
    const int64_t row = heads * columns, image = rows * row;
    const TensorMap map =
        emulation::encode_heads({data, images, rows, heads, columns, image, row, columns, box_rows, 64});
    emulation::Block block(32, 128 * box_rows + 8, {{data, static_cast<size_t>(2 * images * image), false}}, 0);
    block.run({}, [=, &map] {
      const uint32_t barrier = 128 * box_rows;
      if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        async_fence();
        mbarrier_arrive_expect(barrier, 128 * box_rows);
        tile_load(0, map, at[0], at[1], at[2], at[3], barrier);
        mbarrier_wait(barrier, 0);
        for (int i = 0; i < 32 * box_rows; ++i) box[i] = load_shared_pair(4 * i);
      }
    });
  });
}

extern "C" uint64_t operand_descriptor(uint32_t address) { return operand(address); }
extern "C" uint32_t swizzled(uint32_t address) { return swizzle(address); }
extern "C" uint64_t transposed_descriptor(uint32_t address, uint32_t box) { return operand_transposed(address, box); }
extern "C" uint32_t transposed_address(uint64_t descriptor, int chunk, int k) {
  return emulation::operand_address(descriptor, chunk, k, true);
}
