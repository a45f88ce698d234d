// The kernels for AVX-512: F, BW, DQ and VL, without the dot-product instructions.

#include <immintrin.h>

#include <type_traits>

#include "cpu/gradient_table.h"

#if defined(__x86_64__)
#define DYNABERT_VEC "cpu/vec_avx512.h"
#define DYNABERT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#define DYNABERT_VNNI 0
#define DYNABERT_BF16 0
#include "cpu/target-begin-inl.h"
namespace dynabert::avx512 {
namespace {
#include "cpu/kernels-inl.h"
}  // namespace
}  // namespace dynabert::avx512
#include "cpu/target-end-inl.h"

namespace dynabert {
extern const KernelTable kAvx512Table;
const KernelTable kAvx512Table = avx512::make_table("avx512");
extern const GradientTable kAvx512Gradients;
const GradientTable kAvx512Gradients = avx512::make_gradients();
}  // namespace dynabert
#endif
