// attention_core.h in float16.

#include "attention_core.cuh"

namespace dynabert {

cudaError_t attention_core_fp16(const AttentionCore& call, cudaStream_t stream) {
  return core::launch_core<__half>(call, stream);
}

}  // namespace dynabert
