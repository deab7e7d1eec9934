// attention on CUDA devices: what its kernels ask of their arguments, which of the two runs, and its launch on torch's
// stream.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

#include "../attention_checks.h"
#include "../guards.h"
#include "../ops.h"
#include "attention_hopper.h"

namespace vitfast {
namespace {

using Optional = std::optional<at::Tensor>;

// The kernel copies rows 16 bytes at a time.
void check_alignment(const char* name, const at::Tensor& tensor) {
  check_storage("attention", name, tensor);
  bool aligned = is_aligned(tensor, 16);
  for (int64_t axis = 0; axis < 3; ++axis) aligned &= tensor.size(axis) <= 1 || tensor.stride(axis) % 8 == 0;
  TORCH_CHECK_VALUE(aligned, "attention: the rows of ", name, " with strides ", shape_text(tensor.strides()),
                    " are not all aligned to 16 bytes");
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& bias, const Optional& mask,
           bool causal) {
  check_attention(q, k, v, bias, mask, {at::kHalf, at::kBFloat16});
  for (const at::Tensor& tensor : {k, v}) {
    TORCH_CHECK_VALUE(tensor.device() == q.device(), "attention: k and v must be on ", q.device(), " like q, got ",
                      tensor.device());
  }
  TORCH_CHECK_VALUE(!bias && !mask && !causal,
                    "attention: the CUDA kernel takes no bias, no mask and no causal; the other backends do");
  bool known = false;
  std::string dims;
  for (int dim : kAttentionHeadDims) {
    known |= q.size(3) == dim;
    dims += (dims.empty() ? "" : ", ") + std::to_string(dim);
  }
  TORCH_CHECK_VALUE(known, "attention: head dim must be one of ", dims, " on CUDA, got ", q.size(3));
  TORCH_CHECK_VALUE(k.size(1) <= kAttentionMaxKeys, "attention: keys must be at most ", kAttentionMaxKeys,
                    " on CUDA, got ", k.size(1));
  TORCH_CHECK_VALUE(q.size(1) <= std::numeric_limits<int>::max() &&
                        product("attention", {q.size(0), q.size(2)}) <= std::numeric_limits<int>::max(),
                    "attention: q of shape ", shape_text(q.sizes()), " is too large for the CUDA kernel");
  check_alignment("q", q);
  check_alignment("k", k);
  check_alignment("v", v);
}

int attribute(cudaDeviceAttr which, const at::Tensor& on) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, on.device().index()));
  return value;
}

// Whether the kernel of attention_hopper.cuh is built, and this a GPU that has its instructions.
bool has_wgmma(const at::Tensor& on) {
  return std::strstr(VITFAST_CUDA_STATE, "90a") != nullptr && attribute(cudaDevAttrComputeCapabilityMajor, on) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, on) == 0;
}

}  // namespace

at::Tensor attention_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& bias,
                          const Optional& mask, bool causal, std::optional<double> scale) {
  check(q, k, v, bias, mask, causal);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard guard(q.device());
  const at::Tensor out = at::empty(q.sizes(), q.options());
  if (k.size(1) == 0) out.zero_();
  if (out.numel() == 0 || k.size(1) == 0) return out;

  const int head_dim = static_cast<int>(q.size(3)), keys = static_cast<int>(k.size(1));
  AttentionParams params{read("attention", "q", q),
                         read("attention", "k", k),
                         read("attention", "v", v),
                         out.mutable_data_ptr(),
                         q.stride(0),
                         q.stride(1),
                         q.stride(2),
                         k.stride(0),
                         k.stride(1),
                         k.stride(2),
                         v.stride(0),
                         v.stride(1),
                         v.stride(2),
                         static_cast<int>(q.size(1)),
                         keys,
                         static_cast<int>(q.size(2)),
                         static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))))};
  const AttentionType type = q.scalar_type() == at::kHalf ? AttentionType::fp16 : AttentionType::bf16;
  const int batch = static_cast<int>(q.size(0));
  void* const stream = c10::cuda::getCurrentCUDAStream().stream();
  if (has_wgmma(q) && attention_hopper_takes(head_dim, params, batch)) {
    const int processors = attribute(cudaDevAttrMultiProcessorCount, q);
    C10_CUDA_CHECK(
        static_cast<cudaError_t>(attention_hopper_launch(type, head_dim, params, batch, processors, stream)));
    return out;
  }
  const int needed = attention_shared_bytes(head_dim, keys);
  const int there = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, q);
  TORCH_CHECK_VALUE(needed <= there, "attention: ", keys, " keys of head dim ", head_dim, " need ", needed,
                    " bytes of shared memory, this GPU has ", there);
  C10_CUDA_CHECK(static_cast<cudaError_t>(attention_launch(type, head_dim, params, batch, stream)));
  return out;
}

}  // namespace vitfast
