// The launchers of gemm_sm90.h under C names, for scripts that load them without an extension:
// nvcc -shared -Xcompiler -fPIC gemm_c_api.cu ../gemm_sm90.cu

#include "../gemm_sm90.h"

extern "C" {

int dynabert_gemm_rows(const void* x, const void* weight, const void* bias, void* out,
                       std::int64_t x_stride, std::int64_t out_stride, std::int32_t tokens,
                       std::int32_t hidden_size, std::int32_t full_width, std::int32_t count,
                       const std::int32_t* device_count, std::int32_t unit, std::int32_t gelu,
                       cudaStream_t stream) {
  return dynabert::gemm_rows_sm90({x,
                                   weight,
                                   bias,
                                   out,
                                   x_stride,
                                   out_stride,
                                   tokens,
                                   hidden_size,
                                   full_width,
                                   {count, device_count, unit},
                                   gelu != 0},
                                  stream);
}

int dynabert_gemm_columns(const void* x, const void* weight, const void* bias, const void* residual,
                          const void* norm_weight, const void* norm_bias, void* norm_workspace,
                          void* out, std::int64_t x_stride, std::int64_t residual_stride,
                          std::int64_t out_stride, std::int32_t tokens, std::int32_t hidden_size,
                          std::int32_t full_width, std::int32_t count,
                          const std::int32_t* device_count, std::int32_t unit, float norm_eps,
                          cudaStream_t stream) {
  return dynabert::gemm_columns_sm90({x,
                                      weight,
                                      bias,
                                      residual,
                                      norm_weight,
                                      norm_bias,
                                      norm_workspace,
                                      out,
                                      x_stride,
                                      residual_stride,
                                      out_stride,
                                      tokens,
                                      hidden_size,
                                      full_width,
                                      {count, device_count, unit},
                                      norm_eps},
                                     stream);
}

int dynabert_gemm_norm_workspace_bytes(std::size_t* bytes) {
  return dynabert::gemm_norm_workspace_bytes(bytes);
}

}  // extern "C"
