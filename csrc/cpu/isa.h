// Which instruction set the CPU kernels use: detected once at run time, or forced by name.

#pragma once

#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace dynabert {

// Each level includes all before it. avx512 is F, BW, DQ and VL together; no CPU has AVX512-BF16
// without AVX512-VNNI, so the levels form one line.
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16 };

// Names of the levels that this CPU and operating system can run, narrowest first.
std::vector<std::string> supported_isas();

// Name of the level in force: the forced one, else the widest supported.
std::string isa_name();

// Forces a level by name for the whole process; an empty name returns to the widest supported.
// Throws (ValueError in Python) if the name is unknown or the CPU cannot run it.
void force_isa(const std::string& name);

// Kernels of the level in force.
const KernelTable& active_table();

}  // namespace dynabert
