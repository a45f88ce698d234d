// One translation unit per element type (gemm_sm80_<type>.cu); arguments are valid, with tokens.

#pragma once

#include "gemm_sm80.h"

namespace dynabert {

cudaError_t gemm_rows_sm80_bf16(const GemmSm80& args, cudaStream_t stream);
cudaError_t gemm_rows_sm80_fp16(const GemmSm80& args, cudaStream_t stream);
cudaError_t gemm_columns_sm80_bf16(const GemmSm80& args, cudaStream_t stream);
cudaError_t gemm_columns_sm80_fp16(const GemmSm80& args, cudaStream_t stream);

}  // namespace dynabert
