// The attention kernel under emulation, as a library for ctypes. CASES lists the instances to compile, as
// CASE(type, head dim, steps).

#include "cuda/attention.cuh"

namespace {

using namespace vitfast;

template <typename T, int D, int steps>
void run(const AttentionParams& params, int batch, const std::vector<emulation::Range>& ranges, uint64_t seed,
         int64_t* bank_conflicts) {
  for (unsigned i = 0; i < static_cast<unsigned>(batch * params.heads); ++i) {
    emulation::Block block(kAttentionThreads, attention_shared_bytes<D>(params.keys), ranges, seed++);
    block.run({i, 0, 0}, [&params] { attention_kernel<T, D, steps>(params); });
    *bank_conflicts += block.bank_conflicts;
  }
}

}  // namespace

// "" or what went wrong. `memory` holds begin and size of q's, k's, v's and out's storage.
extern "C" const char* attention(const char* type, int head_dim, int steps, const AttentionParams* params, int batch,
                                 const void* const* memory, const int64_t* sizes, uint64_t seed,
                                 int64_t* bank_conflicts) {
  static std::string message;
  std::vector<emulation::Range> ranges;
  for (int i = 0; i < 4; ++i) ranges.push_back({memory[i], static_cast<size_t>(sizes[i]), i == 3});
  const std::string asked = std::string(type) + " " + std::to_string(head_dim) + " " + std::to_string(steps);
  *bank_conflicts = 0;
  try {
#define CASE(T, D, S)                                           \
  if (asked == #T " " #D " " #S) {                              \
    run<T, D, S>(*params, batch, ranges, seed, bank_conflicts); \
    return "";                                                  \
  }
    CASES
    throw emulation::Trap("not compiled: " + asked);
  } catch (const emulation::Trap& trap) {
    message = trap.what();
  }
  return message.c_str();
}
