// Everything that is compiled once per instruction set. DYNABERT_VEC names the header of its vector
// type; each file builds on those before it.

// clang-format off
#include DYNABERT_VEC
#include "cpu/math-inl.h"
#include "cpu/gemm-inl.h"
#include "ffn/ffn_cpu-inl.h"
#include "attention/attention_cpu-inl.h"
#include "cpu/table-inl.h"
#include "cpu/dropout-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/training-inl.h"
#include "ffn/ffn_gradient_cpu-inl.h"
#include "attention/attention_gradient_cpu-inl.h"
#include "cpu/gradient_table-inl.h"
// clang-format on
