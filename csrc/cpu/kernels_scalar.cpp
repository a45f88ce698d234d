// The kernels for whatever the compiler targets by default.

#include <type_traits>

#include "cpu/gradient_table.h"

#define DYNABERT_VEC "cpu/vec_scalar.h"

namespace dynabert::scalar {
namespace {
#include "cpu/kernels-inl.h"
}  // namespace
}  // namespace dynabert::scalar

namespace dynabert {
extern const KernelTable kScalarTable;
const KernelTable kScalarTable = scalar::make_table("scalar");
extern const GradientTable kScalarGradients;
const GradientTable kScalarGradients = scalar::make_gradients();
}  // namespace dynabert
