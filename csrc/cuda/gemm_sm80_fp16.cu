// The products of gemm_sm80.h in float16.

#include "gemm_sm80.cuh"
#include "gemm_sm80_launch.h"

namespace dynabert {

cudaError_t gemm_rows_sm80_fp16(const GemmSm80& args, cudaStream_t stream) {
  return launch_gemm_sm80<__half, GemmForm::kRows>(args, stream);
}

cudaError_t gemm_columns_sm80_fp16(const GemmSm80& args, cudaStream_t stream) {
  return launch_gemm_sm80<__half, GemmForm::kColumns>(args, stream);
}

}  // namespace dynabert
