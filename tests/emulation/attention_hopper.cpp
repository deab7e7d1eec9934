// The attention kernel for sm_90a under emulation, as a library for ctypes. CASES lists the instances to compile, as
// CASE(type, head dim, keys).

#include "cuda/attention_hopper.cuh"

namespace {

using namespace vitfast;

template <typename T, int D, int kKeys>
int64_t run(const AttentionParams& call, int batch, int blocks, const std::vector<emulation::Range>& ranges,
            uint64_t seed) {
  const AttentionHopperParams params = attention_hopper_params(call, D, batch, kKeys, &emulation::encode_heads);
  int64_t bank_conflicts = 0;
  for (int i = 0; i < blocks; ++i) {
    emulation::Block block(kAttentionHopperThreads, AttentionShared<D, kKeys>::bytes, ranges, seed++, 16);
    emulation::hopper_of(block).registers = 65536 / kAttentionHopperThreads / 8 * 8;
    block.run({static_cast<unsigned>(i), 0, 0}, [&params] { attention_hopper_kernel<T, D, kKeys>(params); }, blocks);
    bank_conflicts += block.bank_conflicts;
  }
  return bank_conflicts;
}

}  // namespace

// "" or what went wrong. `memory` holds begin and size of q's, k's, v's and out's storage.
extern "C" const char* attention(const char* type, int head_dim, int keys, const AttentionParams* params, int batch,
                                 int blocks, const void* const* memory, const int64_t* sizes, uint64_t seed,
                                 int64_t* bank_conflicts) {
  static std::string message;
  std::vector<emulation::Range> ranges;
  for (int i = 0; i < 4; ++i) ranges.push_back({memory[i], static_cast<size_t>(sizes[i]), i == 3});
  const std::string asked = std::string(type) + " " + std::to_string(head_dim) + " " + std::to_string(keys);
  try {
#define CASE(T, D, N)                                                     \
  if (asked == #T " " #D " " #N) {                                        \
    *bank_conflicts = run<T, D, N>(*params, batch, blocks, ranges, seed); \
    return "";                                                            \
  }
    CASES
    throw emulation::Trap("not compiled: " + asked);
  } catch (const emulation::Trap& trap) {
    message = trap.what();
  }
  return message.c_str();
}

extern "C" bool takes(int head_dim, const AttentionParams* params, int batch) {
  return attention_hopper_takes(head_dim, *params, batch);
}
