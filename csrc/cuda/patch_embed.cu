// The instances of the patch_embed kernel, and their launch.

#include <cuda_runtime_api.h>

#include "patch_embed.cuh"

namespace vitfast {
namespace {

template <PixelType type, int middle, int inner>
int launch(const PatchEmbedParams& p, cudaStream_t stream) {
  const int64_t row_tiles = (static_cast<int64_t>(p.rows) + kPatchEmbedTile - 1) / kPatchEmbedTile;
  const int64_t column_tiles = (p.width + kPatchEmbedTile - 1) / kPatchEmbedTile;
  const unsigned blocks = static_cast<unsigned>(row_tiles * column_tiles);
  patch_embed_kernel<type, middle, inner><<<blocks, kPatchEmbedThreads, kPatchEmbedSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

// Patches of 16 and 14 pixels have instances of their own: uint8 with interleaved channels, bf16 with planes.
int patch_embed_launch(PixelType type, const PatchEmbedParams& p, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const auto is = [&p](int middle, int inner) { return p.pairs && p.middle == middle && p.inner == inner; };
  if (type == PixelType::uint8) {
    if (is(16, 48)) return launch<PixelType::uint8, 16, 48>(p, s);
    if (is(14, 42)) return launch<PixelType::uint8, 14, 42>(p, s);
    return launch<PixelType::uint8, 0, 0>(p, s);
  }
  if (is(16, 16)) return launch<PixelType::bf16, 16, 16>(p, s);
  if (is(14, 14)) return launch<PixelType::bf16, 14, 14>(p, s);
  return launch<PixelType::bf16, 0, 0>(p, s);
}

}  // namespace vitfast
