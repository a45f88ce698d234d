// The kernels for AVX-512 with VNNI.

#include <immintrin.h>

#include <type_traits>

#include "cpu/gradient_table.h"

#if defined(__x86_64__)
#define DYNABERT_VEC "cpu/vec_avx512.h"
#define DYNABERT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define DYNABERT_VNNI 1
#define DYNABERT_BF16 0
#include "cpu/target-begin-inl.h"
namespace dynabert::avx512_vnni {
namespace {
#include "cpu/kernels-inl.h"
}  // namespace
}  // namespace dynabert::avx512_vnni
#include "cpu/target-end-inl.h"

namespace dynabert {
extern const KernelTable kAvx512VnniTable;
const KernelTable kAvx512VnniTable = avx512_vnni::make_table("avx512_vnni");
extern const GradientTable kAvx512VnniGradients;
const GradientTable kAvx512VnniGradients = avx512_vnni::make_gradients();
}  // namespace dynabert
#endif
