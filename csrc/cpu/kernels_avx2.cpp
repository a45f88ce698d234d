// The kernels for AVX2 and FMA.

#include <immintrin.h>

#include <type_traits>

#include "cpu/gradient_table.h"

#if defined(__x86_64__)
#define DYNABERT_VEC "cpu/vec_avx2.h"
#define DYNABERT_TARGET "avx2,fma"
#include "cpu/target-begin-inl.h"
namespace dynabert::avx2 {
namespace {
#include "cpu/kernels-inl.h"
}  // namespace
}  // namespace dynabert::avx2
#include "cpu/target-end-inl.h"

namespace dynabert {
extern const KernelTable kAvx2Table;
const KernelTable kAvx2Table = avx2::make_table("avx2");
extern const GradientTable kAvx2Gradients;
const GradientTable kAvx2Gradients = avx2::make_gradients();
}  // namespace dynabert
#endif
