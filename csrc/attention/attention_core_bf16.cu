// attention_core.h in bfloat16.

#include "attention_core.cuh"

namespace dynabert {

cudaError_t attention_core_bf16(const AttentionCore& call, cudaStream_t stream) {
  return core::launch_core<__nv_bfloat16>(call, stream);
}

}  // namespace dynabert
