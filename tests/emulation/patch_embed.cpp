// The patch_embed kernel under emulation, as a library for ctypes. CASES lists the instances to compile, as
// CASE(type, middle, inner).

#include "cuda/patch_embed.cuh"

namespace {

using namespace vitfast;

template <PixelType type, int middle, int inner>
void run(const PatchEmbedParams& params, const std::vector<emulation::Range>& ranges, uint64_t seed,
         int64_t* bank_conflicts) {
  const int tile = kPatchEmbedTile;
  const int blocks = (params.rows + tile - 1) / tile * ((params.width + tile - 1) / tile);
  for (unsigned i = 0; i < static_cast<unsigned>(blocks); ++i) {
    emulation::Block block(kPatchEmbedThreads, kPatchEmbedSharedBytes, ranges, seed++);
    block.run({i, 0, 0}, [&params] { patch_embed_kernel<type, middle, inner>(params); });
    *bank_conflicts += block.bank_conflicts;
  }
}

}  // namespace

extern "C" int patch_embed_shared_bytes() { return kPatchEmbedSharedBytes; }

// "" or what went wrong. `memory` holds begin and size of what may be read, and last of out's storage.
extern "C" const char* patch_embed(const char* type, int middle, int inner, const PatchEmbedParams* params, int ranges,
                                   const void* const* memory, const int64_t* sizes, uint64_t seed,
                                   int64_t* bank_conflicts) {
  static std::string message;
  std::vector<emulation::Range> all;
  for (int i = 0; i < ranges; ++i) all.push_back({memory[i], static_cast<size_t>(sizes[i]), i == ranges - 1});
  const std::string asked = std::string(type) + " " + std::to_string(middle) + " " + std::to_string(inner);
  *bank_conflicts = 0;
  try {
#define CASE(T, M, I)                                            \
  if (asked == #T " " #M " " #I) {                               \
    run<PixelType::T, M, I>(*params, all, seed, bank_conflicts); \
    return "";                                                   \
  }
    CASES
    throw emulation::Trap("not compiled: " + asked);
  } catch (const emulation::Trap& trap) {
    message = trap.what();
  }
  return message.c_str();
}
