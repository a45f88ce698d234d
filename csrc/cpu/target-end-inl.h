// Closes the region of target-begin-inl.h.

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif
#undef DYNABERT_EXPAND_PRAGMA
#undef DYNABERT_PRAGMA
