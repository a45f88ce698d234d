// The kernels for AVX-512 with VNNI and BF16.

#include <immintrin.h>

#include <type_traits>

#include "cpu/gradient_table.h"

#if defined(__x86_64__)
#define DYNABERT_VEC "cpu/vec_avx512.h"
#define DYNABERT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
#define DYNABERT_VNNI 1
#define DYNABERT_BF16 1
#include "cpu/target-begin-inl.h"
namespace dynabert::avx512_bf16 {
namespace {
#include "cpu/kernels-inl.h"
}  // namespace
}  // namespace dynabert::avx512_bf16
#include "cpu/target-end-inl.h"

namespace dynabert {
extern const KernelTable kAvx512Bf16Table;
const KernelTable kAvx512Bf16Table = avx512_bf16::make_table("avx512_bf16");
extern const GradientTable kAvx512Bf16Gradients;
const GradientTable kAvx512Bf16Gradients = avx512_bf16::make_gradients();
}  // namespace dynabert
#endif
