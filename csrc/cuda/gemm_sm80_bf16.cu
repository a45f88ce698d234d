// The products of gemm_sm80.h in bfloat16.

#include "gemm_sm80.cuh"
#include "gemm_sm80_launch.h"

namespace dynabert {

cudaError_t gemm_rows_sm80_bf16(const GemmSm80& args, cudaStream_t stream) {
  return launch_gemm_sm80<__nv_bfloat16, GemmForm::kRows>(args, stream);
}

cudaError_t gemm_columns_sm80_bf16(const GemmSm80& args, cudaStream_t stream) {
  return launch_gemm_sm80<__nv_bfloat16, GemmForm::kColumns>(args, stream);
}

}  // namespace dynabert
