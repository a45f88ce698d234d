// Opens a region whose functions are compiled for DYNABERT_TARGET. System headers come before it:
// what they define must not be compiled for one instruction set and linked for all.

#define DYNABERT_PRAGMA(text) _Pragma(#text)
#define DYNABERT_EXPAND_PRAGMA(text) DYNABERT_PRAGMA(text)
#if defined(__clang__)
DYNABERT_EXPAND_PRAGMA(clang attribute push(__attribute__((target(DYNABERT_TARGET))),
                                            apply_to = function))
#else
// GCC 12 takes the undefined operands inside its own intrinsics for ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
DYNABERT_EXPAND_PRAGMA(GCC target(DYNABERT_TARGET))
#endif
