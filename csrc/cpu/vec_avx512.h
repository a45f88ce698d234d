// 16 floats in one AVX-512 register, and the products of one panel step.
//
// Included inside a target region and a namespace per instruction set. DYNABERT_VNNI and
// DYNABERT_BF16 say which dot-product instructions the region has; without them the same products
// are put together from AVX-512BW.

// Registers: 24 accumulators, 4 panels, one broadcast; 6 x 4 reaches 92 % of the peak of two FMA
// pipes (Zen 5), as do 8 x 3, 12 x 2 and 14 x 2, with the fewest loads per product.
constexpr int kTileRows = 6;
constexpr int kTilePanels = 4;

using F32x16 = __m512;
using I32x16 = __m512i;

inline __mmask16 first_lanes(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline F32x16 zero() { return _mm512_setzero_ps(); }
inline F32x16 set1(float x) { return _mm512_set1_ps(x); }
inline F32x16 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32x16 load(const float* p, std::int64_t n) {
  if (n >= kLanes) return load(p);
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
inline void store(float* p, F32x16 x) { _mm512_storeu_ps(p, x); }
// Whole vectors by name: a masked store takes the core several times as long.
inline void store(float* p, F32x16 x, std::int64_t n) {
  if (n >= kLanes) return store(p, x);
  _mm512_mask_storeu_ps(p, first_lanes(n), x);
}
// x in the first n lanes, `other` in the rest.
inline F32x16 select_first(std::int64_t n, F32x16 x, F32x16 other) {
  return _mm512_mask_blend_ps(first_lanes(n), other, x);
}
inline F32x16 add(F32x16 a, F32x16 b) { return _mm512_add_ps(a, b); }
inline F32x16 sub(F32x16 a, F32x16 b) { return _mm512_sub_ps(a, b); }
inline F32x16 mul(F32x16 a, F32x16 b) { return _mm512_mul_ps(a, b); }
inline F32x16 div(F32x16 a, F32x16 b) { return _mm512_div_ps(a, b); }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }
// NaN in `b` is kept, as in the instruction.
inline F32x16 max(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }
inline F32x16 min(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }
inline F32x16 abs(F32x16 a) { return _mm512_abs_ps(a); }
// Of non-negative numbers; unlike `max`, a NaN on either side wins, as its bits are the largest.
inline F32x16 max_or_nan(F32x16 a, F32x16 b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline float max_or_nan_of(F32x16 x) {
  const std::int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(x));
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline F32x16 round_to_even(F32x16 a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// `inside` where |x| < limit, else `outside`.
inline F32x16 select_within(F32x16 x, float limit, F32x16 inside, F32x16 outside) {
  const __mmask16 within = _mm512_cmp_ps_mask(_mm512_abs_ps(x), set1(limit), _CMP_LT_OQ);
  return _mm512_mask_blend_ps(within, outside, inside);
}
// Lane i is table[the low four bits of index[i]].
inline F32x16 lookup(const float (&table)[16], F32x16 index) {
  return _mm512_permutexvar_ps(_mm512_castps_si512(index), _mm512_load_ps(table));
}
// x * 2^n for whole n.
inline F32x16 scale_by_power(F32x16 x, F32x16 n) { return _mm512_scalef_ps(x, n); }
inline float sum_of(F32x16 x) { return _mm512_reduce_add_ps(x); }
inline float max_of(F32x16 x) { return _mm512_reduce_max_ps(x); }

inline F32x16 load_bf16(const std::uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline F32x16 load_bf16(const std::uint16_t* p, std::int64_t n) {
  if (n >= kLanes) return load_bf16(p);
  const __m256i half = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
// Round to nearest, ties to even; a NaN stays one.
inline __m256i to_bf16(F32x16 x) {
#if DYNABERT_BF16
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16));
#endif
}
inline void store_bf16(std::uint16_t* p, F32x16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x));
}
inline void store_bf16(std::uint16_t* p, F32x16 x, std::int64_t n) {
  if (n >= kLanes) return store_bf16(p, x);
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(x));
}
// x holds whole numbers of [-127, 127].
inline void store_int8(std::int8_t* p, F32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

inline I32x16 load_int32(const std::int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_int32(std::int32_t* p, I32x16 x) { _mm512_storeu_si512(p, x); }
inline F32x16 to_float(I32x16 x) { return _mm512_cvtepi32_ps(x); }
inline I32x16 subtract(I32x16 x, std::int32_t y) {
  return _mm512_sub_epi32(x, _mm512_set1_epi32(y));
}

// Words of 32 bits, for counters and masks.
inline I32x16 set1_word(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline I32x16 word_lanes() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline I32x16 add_words(I32x16 a, I32x16 b) { return _mm512_add_epi32(a, b); }
inline I32x16 exclusive_or(I32x16 a, I32x16 b) { return _mm512_xor_si512(a, b); }
// All bits set where the highest is.
inline I32x16 spread_sign(I32x16 x) { return _mm512_srai_epi32(x, 31); }
inline I32x16 low_halves(I32x16 x) { return _mm512_and_si512(x, _mm512_set1_epi32(0xFFFF)); }
inline I32x16 high_halves(I32x16 x) { return _mm512_srli_epi32(x, 16); }
// The low and high words of x * factor.
inline I32x16 multiply_wide(I32x16 x, std::uint32_t factor, I32x16* high) {
  const __m512i y = set1_word(factor);
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  *high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

// Transposes 16 x 16 units: lane r of to[16 * c] is from[r * stride + c], for r < rows, c <
// columns; other lanes are zero. Used to turn keys into panels.
inline void transpose_units(const std::uint32_t* from, std::int64_t stride, std::int64_t rows,
                            std::int64_t columns, std::uint32_t* to) {
  __m512i r[16];
  const __mmask16 mask = first_lanes(columns);
  for (int i = 0; i < 16; ++i) {
    r[i] = i < rows ? _mm512_maskz_loadu_epi32(mask, from + i * stride) : _mm512_setzero_si512();
  }
  __m512i s[16];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + 2 + j]);
    }
  }
  // r[4 * b + q]: rows 4b..4b+3 of columns q, 4 + q, 8 + q, 12 + q, one per 128-bit lane.
  for (int q = 0; q < 4; ++q) {
    const __m512i low01 = _mm512_shuffle_i32x4(r[q], r[4 + q], 0x88);
    const __m512i high01 = _mm512_shuffle_i32x4(r[q], r[4 + q], 0xDD);
    const __m512i low23 = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0xDD);
    const __m512i columns_of[4] = {
        _mm512_shuffle_i32x4(low01, low23, 0x88), _mm512_shuffle_i32x4(high01, high23, 0x88),
        _mm512_shuffle_i32x4(low01, low23, 0xDD), _mm512_shuffle_i32x4(high01, high23, 0xDD)};
    for (int b = 0; b < 4; ++b) {
      if (4 * b + q < columns) _mm512_storeu_si512(to + 16 * (4 * b + q), columns_of[b]);
    }
  }
}
// to[2 * i] = a[i], to[2 * i + 1] = b[i] for 16 values of 16 bits; lanes from n on are zero.
inline void interleave(const std::uint16_t* a, const std::uint16_t* b, std::int64_t n,
                       std::uint32_t* to) {
  const __mmask16 mask = first_lanes(n);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
  const __m512i high = b == nullptr ? _mm512_setzero_si512()
                                    : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// A Dot multiplies a token's broadcast unit with one panel step and adds to 16 sums.
struct DotFloat32 {
  using Sum = F32x16;
  using Panel = F32x16;
  using Unit = F32x16;
  static Sum zero_sum() { return zero(); }
  static Panel load(const std::byte* p) { return _mm512_loadu_ps(p); }
  static Unit broadcast(std::uint32_t unit) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(unit)));
  }
  static Sum step(Sum sum, Unit a, Panel b) { return _mm512_fmadd_ps(a, b, sum); }
  static void store(float* p, Sum sum) { _mm512_storeu_ps(p, sum); }
};

#if DYNABERT_BF16
struct DotBFloat16 {
  using Sum = F32x16;
  using Panel = __m512bh;
  using Unit = __m512bh;
  static Sum zero_sum() { return zero(); }
  static Panel load(const std::byte* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Unit broadcast(std::uint32_t unit) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(unit));
  }
  static Sum step(Sum sum, Unit a, Panel b) { return _mm512_dpbf16_ps(sum, a, b); }
  static void store(float* p, Sum sum) { _mm512_storeu_ps(p, sum); }
};
#else
struct DotBFloat16 {
  struct Pair {
    F32x16 even, odd;
  };
  using Sum = F32x16;
  using Panel = Pair;
  using Unit = Pair;
  static Pair split(__m512i pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(~0xFFFF)))};
  }
  static Sum zero_sum() { return zero(); }
  static Panel load(const std::byte* p) { return split(_mm512_loadu_si512(p)); }
  static Unit broadcast(std::uint32_t unit) {
    return split(_mm512_set1_epi32(static_cast<int>(unit)));
  }
  static Sum step(Sum sum, Unit a, Panel b) {
    return _mm512_fmadd_ps(a.odd, b.odd, _mm512_fmadd_ps(a.even, b.even, sum));
  }
  static void store(float* p, Sum sum) { _mm512_storeu_ps(p, sum); }
};
#endif

// Weights are stored with 128 added, as unsigned bytes, which is what the instruction multiplies
// with signed ones; the epilogue takes 128 * sum(token) off again.
#if DYNABERT_VNNI
struct DotInt8 {
  using Sum = I32x16;
  using Panel = __m512i;
  using Unit = __m512i;
  static Sum zero_sum() { return _mm512_setzero_si512(); }
  static Panel load(const std::byte* p) { return _mm512_loadu_si512(p); }
  static Unit broadcast(std::uint32_t unit) { return _mm512_set1_epi32(static_cast<int>(unit)); }
  static Sum step(Sum sum, Unit a, Panel b) {
    // Not the intrinsic, with which g++ 12 copies each sum.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    return sum;
  }
  static void store(float* p, Sum sum) { _mm512_storeu_si512(p, sum); }
};
#else
struct DotInt8 {
  struct Pair {
    __m512i even, odd;  // 16-bit
  };
  using Sum = I32x16;
  using Panel = Pair;
  using Unit = Pair;
  static Sum zero_sum() { return _mm512_setzero_si512(); }
  static Panel load(const std::byte* p) {
    const __m512i bytes = _mm512_loadu_si512(p);
    return {_mm512_and_si512(bytes, _mm512_set1_epi16(0x00FF)), _mm512_srli_epi16(bytes, 8)};
  }
  static Unit broadcast(std::uint32_t unit) {
    const __m512i bytes = _mm512_set1_epi32(static_cast<int>(unit));
    return {_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8)};
  }
  static Sum step(Sum sum, Unit a, Panel b) {
    return _mm512_add_epi32(
        sum, _mm512_add_epi32(_mm512_madd_epi16(a.even, b.even), _mm512_madd_epi16(a.odd, b.odd)));
  }
  static void store(float* p, Sum sum) { _mm512_storeu_si512(p, sum); }
};
#endif
