// The machine's own limits, measured: what the CPU benchmarks hold every rate against.

#pragma once

#include <string>

namespace dynabert {

// Runs the densest loop there is for `kind` on `threads` threads at once and returns the rate of
// all of them together.
//
//   "fp32"    multiply-adds of floats; AVX-512, else AVX2
//   "bf16"    dot products of bfloat16 pairs into floats (AVX512-BF16)
//   "int8"    dot products of byte quads into 32-bit integers (AVX512-VNNI)
//   "memory"  reading memory far larger than the caches, each thread its own part
//
// Operations per second, two per multiply-add; bytes per second for "memory". The best of several
// slices within `seconds`, since whatever else the machine does only takes away.
// Throws (ValueError in Python) for an unknown kind, a count or time that is not positive, and a
// kind whose instructions this CPU lacks.
double measure_peak(const std::string& kind, int threads, double seconds);

}  // namespace dynabert
