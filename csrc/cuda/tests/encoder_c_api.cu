// The launchers of encoder_cuda.h under C names, for scripts that load them without an extension:
// nvcc -shared -Xcompiler -fPIC encoder_c_api.cu ../../encoder/encoder_cuda.cu

#include "../../encoder/encoder_cuda.h"

extern "C" {

const char* dynabert_encoder_why_not(std::int32_t tokens, std::int32_t sequences,
                                     std::int32_t layers, std::int32_t hidden_size,
                                     std::int32_t head_dim, std::int32_t max_heads,
                                     std::int32_t max_intermediate) {
  return dynabert::encoder_why_not(
      {tokens, sequences, layers, hidden_size, head_dim, max_heads, max_intermediate});
}

std::size_t dynabert_encoder_workspace_bytes(std::int32_t tokens, std::int32_t sequences,
                                             std::int32_t layers, std::int32_t hidden_size,
                                             std::int32_t head_dim, std::int32_t max_heads,
                                             std::int32_t max_intermediate) {
  return dynabert::encoder_workspace_bytes(
      {tokens, sequences, layers, hidden_size, head_dim, max_heads, max_intermediate});
}

// weights: [layers, 12] pointers in the order of EncoderLayer.
int dynabert_encoder_forward(std::int32_t tokens, std::int32_t sequences, std::int32_t layers,
                             std::int32_t hidden_size, std::int32_t head_dim,
                             std::int32_t max_heads, std::int32_t max_intermediate,
                             const void* hidden, void* output, const std::int32_t* cu_seqlens,
                             const void* weights, const std::int32_t* num_kept,
                             const std::int32_t* layer_list, const std::int32_t* num_heads,
                             const std::int32_t* intermediate_size, float norm_eps, void* workspace,
                             cudaStream_t stream) {
  return dynabert::encoder_forward(
      {tokens, sequences, layers, hidden_size, head_dim, max_heads, max_intermediate},
      {hidden, output, cu_seqlens, static_cast<const dynabert::EncoderLayer*>(weights), num_kept,
       layer_list, num_heads, intermediate_size, norm_eps, workspace},
      stream);
}

}  // extern "C"
