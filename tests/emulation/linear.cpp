// The linear kernel under emulation, as a library for ctypes. CASES lists the instances to compile, as
// CASE(type of x and the weight, type of the rest, columns of a tile).

#include "cuda/linear.cuh"

namespace {

using namespace vitfast;

template <typename X, typename T, int kColumns>
int64_t run(const LinearCall& call, int blocks, const std::vector<emulation::Range>& ranges, uint64_t seed) {
  const LinearParams params = linear_params(call, kColumns, &emulation::encode);
  int64_t bank_conflicts = 0;
  for (int first = 0; first < blocks; first += kLinearCluster) {
    std::deque<emulation::Block> made;
    std::vector<emulation::Block*> cluster;
    for (int i = 0; i < kLinearCluster; ++i) {
      made.emplace_back(kLinearThreads, LinearShared<kColumns>::bytes, ranges, seed++, 16);
      emulation::hopper_of(made.back()).registers = 65536 / kLinearThreads / 8 * 8;
      cluster.push_back(&made.back());
    }
    emulation::Block::run_cluster(
        cluster, {static_cast<unsigned>(first), 0, 0}, [&params] { linear_kernel<X, T, kColumns>(params); }, blocks);
    for (const emulation::Block& block : made) bank_conflicts += block.bank_conflicts;
  }
  return bank_conflicts;
}

}  // namespace

// "" or what went wrong. `memory`: what may be read, the last `outputs` of it written.
extern "C" const char* linear(const char* types, int columns, const LinearCall* call, int blocks,
                              const void* const* memory, const int64_t* sizes, int count, int outputs, uint64_t seed,
                              int64_t* bank_conflicts) {
  static std::string message;
  std::vector<emulation::Range> ranges;
  for (int i = 0; i < count; ++i) ranges.push_back({memory[i], static_cast<size_t>(sizes[i]), i >= count - outputs});
  const std::string asked = std::string(types) + " " + std::to_string(columns);
  try {
#define CASE(X, T, N)                                            \
  if (asked == #X " " #T " " #N) {                               \
    *bank_conflicts = run<X, T, N>(*call, blocks, ranges, seed); \
    return "";                                                   \
  }
    CASES
    throw emulation::Trap("not compiled: " + asked);
  } catch (const emulation::Trap& trap) {
    message = trap.what();
  }
  return message.c_str();
}

extern "C" int tile_columns(int m, int n, int processors) { return linear_columns(m, n, processors); }
extern "C" int grid_blocks(int m, int n, int processors) {
  return linear_blocks(m, n, linear_columns(m, n, processors), processors);
}
