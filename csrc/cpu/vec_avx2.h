// 16 floats in a pair of AVX2 registers, and the products of one panel step.
//
// Included inside a target region and a namespace; the functions are those of vec_avx512.h.

// Registers, of 16: 12 accumulators, 2 halves of a panel, one broadcast. On Zen 5 (66 tokens, 768
// to 3072 and back) 6 rows reach 125 Gflop/s in float32, 4 rows 104; pairs of bfloat16 do not fit
// and reach 92 instead of 99.
constexpr int kTileRows = 6;
constexpr int kTilePanels = 1;

struct F32x16 {
  __m256 low, high;
};
struct I32x16 {
  __m256i low, high;
};

// All bits set in the lanes below n of lanes 0 to 7, and of lanes 8 to 15.
inline I32x16 first_lanes(std::int64_t n) {
  const __m256i count = _mm256_set1_epi32(static_cast<int>(n));
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_cmpgt_epi32(count, lane),
          _mm256_cmpgt_epi32(count, _mm256_add_epi32(lane, _mm256_set1_epi32(8)))};
}
inline F32x16 as_float(I32x16 x) {
  return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)};
}
inline I32x16 as_int32(F32x16 x) {
  return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)};
}

inline F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F32x16 load(const float* p, std::int64_t n) {
  if (n >= kLanes) return load(p);
  const I32x16 mask = first_lanes(n);
  return {_mm256_maskload_ps(p, mask.low), _mm256_maskload_ps(p + 8, mask.high)};
}
inline void store(float* p, F32x16 x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline void store(float* p, F32x16 x, std::int64_t n) {
  if (n >= kLanes) return store(p, x);
  const I32x16 mask = first_lanes(n);
  _mm256_maskstore_ps(p, mask.low, x.low);
  _mm256_maskstore_ps(p + 8, mask.high, x.high);
}
// x in the first n lanes, `other` in the rest.
inline F32x16 select_first(std::int64_t n, F32x16 x, F32x16 other) {
  const F32x16 mask = as_float(first_lanes(n));
  return {_mm256_blendv_ps(other.low, x.low, mask.low),
          _mm256_blendv_ps(other.high, x.high, mask.high)};
}
inline F32x16 add(F32x16 a, F32x16 b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline F32x16 div(F32x16 a, F32x16 b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
// NaN in `b` is kept, as in the instruction.
inline F32x16 max(F32x16 a, F32x16 b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline F32x16 abs(F32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
// Of non-negative numbers; unlike `max`, a NaN on either side wins, as its bits are the largest.
inline F32x16 max_or_nan(F32x16 a, F32x16 b) {
  const I32x16 x = as_int32(a), y = as_int32(b);
  return as_float({_mm256_max_epi32(x.low, y.low), _mm256_max_epi32(x.high, y.high)});
}
inline float max_or_nan_of(F32x16 x) {
  const I32x16 bits = as_int32(x);
  const __m256i eight = _mm256_max_epi32(bits.low, bits.high);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
  return _mm_cvtss_f32(_mm_castsi128_ps(four));
}
inline F32x16 round_to_even(F32x16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kMode), _mm256_round_ps(a.high, kMode)};
}
// `inside` where |x| < limit, else `outside`.
inline F32x16 select_within(F32x16 x, float limit, F32x16 inside, F32x16 outside) {
  const F32x16 size = abs(x), bound = set1(limit);
  return {_mm256_blendv_ps(outside.low, inside.low, _mm256_cmp_ps(size.low, bound.low, _CMP_LT_OQ)),
          _mm256_blendv_ps(outside.high, inside.high,
                           _mm256_cmp_ps(size.high, bound.high, _CMP_LT_OQ))};
}
// 2^n as two factors, since the exponent field holds no power below -126.
inline __m256 scale_half(__m256 x, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(n), first = _mm256_srai_epi32(whole, 1);
  const __m256i one = _mm256_set1_epi32(127);
  const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(first, one), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, first), one), 23);
  return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}
// Lane i is table[the low four bits of index[i]].
inline __m256 lookup_eight(const float (&table)[16], __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline F32x16 lookup(const float (&table)[16], F32x16 index) {
  return {lookup_eight(table, _mm256_castps_si256(index.low)),
          lookup_eight(table, _mm256_castps_si256(index.high))};
}
// x * 2^n for whole n of [-252, 254].
inline F32x16 scale_by_power(F32x16 x, F32x16 n) {
  return {scale_half(x.low, n.low), scale_half(x.high, n.high)};
}
inline float sum_of(F32x16 x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_shuffle_ps(four, four, 0x4E));
  return _mm_cvtss_f32(_mm_add_ps(four, _mm_shuffle_ps(four, four, 0xB1)));
}
inline float max_of(F32x16 x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_shuffle_ps(four, four, 0x4E));
  return _mm_cvtss_f32(_mm_max_ps(four, _mm_shuffle_ps(four, four, 0xB1)));
}

inline F32x16 load_bf16(const std::uint16_t* p) {
  const auto* eight = reinterpret_cast<const __m128i*>(p);
  return as_float({_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(eight)), 16),
                   _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(eight + 1)), 16)});
}
inline F32x16 load_bf16(const std::uint16_t* p, std::int64_t n) {
  if (n >= kLanes) return load_bf16(p);
  std::uint16_t whole[kLanes] = {};
  __builtin_memcpy(whole, p, n * sizeof *p);
  return load_bf16(whole);
}
// Round to nearest, ties to even, in the low 16 bits of each lane; a NaN stays one.
inline __m256i to_bf16_half(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}
// 32 values of 16 or 8 bits in order: packing works within halves of a register.
inline __m256i pack_in_order(__m256i packed) { return _mm256_permute4x64_epi64(packed, 0xD8); }
inline void store_bf16(std::uint16_t* p, F32x16 x) {
  const __m256i packed = _mm256_packus_epi32(to_bf16_half(x.low), to_bf16_half(x.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_in_order(packed));
}
inline void store_bf16(std::uint16_t* p, F32x16 x, std::int64_t n) {
  if (n >= kLanes) return store_bf16(p, x);
  std::uint16_t whole[kLanes];
  store_bf16(whole, x);
  __builtin_memcpy(p, whole, n * sizeof *p);
}
// x holds whole numbers of [-127, 127]; NaN becomes 0.
inline void store_int8(std::int8_t* p, F32x16 x) {
  const __m256i byte = _mm256_set1_epi32(0xFF);
  const __m256i words =
      pack_in_order(_mm256_packus_epi32(_mm256_and_si256(_mm256_cvtps_epi32(x.low), byte),
                                        _mm256_and_si256(_mm256_cvtps_epi32(x.high), byte)));
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

inline __m256i load_eight(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void store_eight(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline I32x16 load_int32(const std::int32_t* p) { return {load_eight(p), load_eight(p + 8)}; }
inline void store_int32(std::int32_t* p, I32x16 x) {
  store_eight(p, x.low);
  store_eight(p + 8, x.high);
}
inline F32x16 to_float(I32x16 x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline I32x16 subtract(I32x16 x, std::int32_t y) {
  const __m256i all = _mm256_set1_epi32(y);
  return {_mm256_sub_epi32(x.low, all), _mm256_sub_epi32(x.high, all)};
}

// Words of 32 bits, for counters and masks.
inline I32x16 set1_word(std::uint32_t x) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
  return {all, all};
}
inline I32x16 word_lanes() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
          _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
inline I32x16 add_words(I32x16 a, I32x16 b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline I32x16 exclusive_or(I32x16 a, I32x16 b) {
  return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
// All bits set where the highest is.
inline I32x16 spread_sign(I32x16 x) {
  return {_mm256_srai_epi32(x.low, 31), _mm256_srai_epi32(x.high, 31)};
}
inline I32x16 low_halves(I32x16 x) {
  const __m256i mask = _mm256_set1_epi32(0xFFFF);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
inline I32x16 high_halves(I32x16 x) {
  return {_mm256_srli_epi32(x.low, 16), _mm256_srli_epi32(x.high, 16)};
}
inline __m256i multiply_wide_half(__m256i x, __m256i y, __m256i* high) {
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
// The low and high words of x * factor.
inline I32x16 multiply_wide(I32x16 x, std::uint32_t factor, I32x16* high) {
  const __m256i y = _mm256_set1_epi32(static_cast<int>(factor));
  return {multiply_wide_half(x.low, y, &high->low), multiply_wide_half(x.high, y, &high->high)};
}

// Transposes 16 x 16 units: lane r of to[16 * c] is from[r * stride + c], for r < rows, c <
// columns; other lanes are zero. Used to turn keys into panels.
inline void transpose_units(const std::uint32_t* from, std::int64_t stride, std::int64_t rows,
                            std::int64_t columns, std::uint32_t* to) {
  const I32x16 masks = first_lanes(columns);
  for (int column = 0; column < columns; column += 8) {
    const __m256i mask = column == 0 ? masks.low : masks.high;
    for (int row = 0; row < kLanes; row += 8) {
      __m256i r[8], s[8];
      for (int i = 0; i < 8; ++i) {
        const auto* at = reinterpret_cast<const int*>(from + (row + i) * stride + column);
        r[i] = row + i < rows ? _mm256_maskload_epi32(at, mask) : _mm256_setzero_si256();
      }
      for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
          r[i + 2 * j] = _mm256_unpacklo_epi64(s[i + j], s[i + 2 + j]);
          r[i + 2 * j + 1] = _mm256_unpackhi_epi64(s[i + j], s[i + 2 + j]);
        }
      }
      // r[4 * b + q]: rows 4b..4b+3 of column q in the low half and of column 4 + q in the high.
      for (int q = 0; q < 4; ++q) {
        std::uint32_t* low = to + kLanes * (column + q) + row;
        std::uint32_t* high = low + 4 * kLanes;
        if (column + q < columns) store_eight(low, _mm256_permute2x128_si256(r[q], r[4 + q], 0x20));
        if (column + 4 + q < columns) {
          store_eight(high, _mm256_permute2x128_si256(r[q], r[4 + q], 0x31));
        }
      }
    }
  }
}
// to[2 * i] = a[i], to[2 * i + 1] = b[i] for 16 values of 16 bits; lanes from n on are zero.
inline void interleave(const std::uint16_t* a, const std::uint16_t* b, std::int64_t n,
                       std::uint32_t* to) {
  const I32x16 second = as_int32(load_bf16(a, n));
  const I32x16 first = b == nullptr ? as_int32(zero()) : as_int32(load_bf16(b, n));
  store_eight(to, _mm256_or_si256(_mm256_srli_epi32(second.low, 16), first.low));
  store_eight(to + 8, _mm256_or_si256(_mm256_srli_epi32(second.high, 16), first.high));
}

// A Dot multiplies a token's broadcast unit with one panel step and adds to 16 sums.
struct DotFloat32 {
  using Sum = F32x16;
  using Panel = F32x16;
  using Unit = __m256;
  static Sum zero_sum() { return zero(); }
  static Panel load(const std::byte* p) { return as_float({load_eight(p), load_eight(p + 32)}); }
  static Unit broadcast(std::uint32_t unit) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(unit)));
  }
  static Sum step(Sum sum, Unit a, Panel b) {
    return {_mm256_fmadd_ps(a, b.low, sum.low), _mm256_fmadd_ps(a, b.high, sum.high)};
  }
  static void store(float* p, Sum sum) {
    _mm256_storeu_ps(p, sum.low);
    _mm256_storeu_ps(p + 8, sum.high);
  }
};

struct DotBFloat16 {
  struct Pair {
    __m256 even, odd;
  };
  struct Panel {
    Pair low, high;
  };
  using Sum = F32x16;
  using Unit = Pair;
  static Pair split(__m256i pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(~0xFFFF)))};
  }
  static Sum zero_sum() { return zero(); }
  static Panel load(const std::byte* p) {
    return {split(load_eight(p)), split(load_eight(p + 32))};
  }
  static Unit broadcast(std::uint32_t unit) {
    return split(_mm256_set1_epi32(static_cast<int>(unit)));
  }
  static Sum step(Sum sum, Unit a, Panel b) {
    return {_mm256_fmadd_ps(a.odd, b.low.odd, _mm256_fmadd_ps(a.even, b.low.even, sum.low)),
            _mm256_fmadd_ps(a.odd, b.high.odd, _mm256_fmadd_ps(a.even, b.high.even, sum.high))};
  }
  static void store(float* p, Sum sum) { DotFloat32::store(p, sum); }
};

// Weights are stored with 128 added, as unsigned bytes, as vec_avx512.h takes them. Products of 16
// bits: the instruction for bytes would saturate.
struct DotInt8 {
  struct Pair {
    __m256i even, odd;
  };
  struct Panel {
    Pair low, high;
  };
  using Sum = I32x16;
  using Unit = Pair;
  static Sum zero_sum() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Pair split(__m256i bytes) {
    return {_mm256_and_si256(bytes, _mm256_set1_epi16(0x00FF)), _mm256_srli_epi16(bytes, 8)};
  }
  static Panel load(const std::byte* p) {
    return {split(load_eight(p)), split(load_eight(p + 32))};
  }
  static Unit broadcast(std::uint32_t unit) {
    const __m256i bytes = _mm256_set1_epi32(static_cast<int>(unit));
    return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
  }
  static __m256i multiply_add(__m256i sum, Unit a, Pair b) {
    return _mm256_add_epi32(
        sum, _mm256_add_epi32(_mm256_madd_epi16(a.even, b.even), _mm256_madd_epi16(a.odd, b.odd)));
  }
  static Sum step(Sum sum, Unit a, Panel b) {
    return {multiply_add(sum.low, a, b.low), multiply_add(sum.high, a, b.high)};
  }
  static void store(float* p, Sum sum) {
    store_eight(p, sum.low);
    store_eight(p + 8, sum.high);
  }
};
