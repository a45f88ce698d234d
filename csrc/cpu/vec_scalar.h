// 16 floats as four vectors of the compiler's own kind, and the products of one panel step: what
// every CPU runs. x86-64 has SSE2 for them and aarch64 has NEON, without a word of either here.
//
// Included inside a namespace; the functions are those of vec_avx512.h.

// Registers, of the 16 of SSE2: 8 accumulators, 4 quarters of a panel, one broadcast, one product.
constexpr int kTileRows = 2;
constexpr int kTilePanels = 1;

typedef float F32x4 __attribute__((vector_size(16)));
typedef std::int32_t I32x4 __attribute__((vector_size(16)));
typedef std::uint32_t U32x4 __attribute__((vector_size(16)));
typedef std::int16_t I16x8 __attribute__((vector_size(16)));

// Members by name: an array here would be kept in memory.
template <class Quarter>
struct Quarters {
  Quarter a, b, c, d;
};
using F32x16 = Quarters<F32x4>;
using I32x16 = Quarters<I32x4>;

template <class Function, class... Args>
inline auto each(Function&& f, const Quarters<Args>&... x) -> Quarters<decltype(f(x.a...))> {
  return {f(x.a...), f(x.b...), f(x.c...), f(x.d...)};
}
template <class Quarter>
inline Quarter load_quarter(const void* p) {
  Quarter x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <class Quarter>
inline Quarters<Quarter> load_quarters(const void* p) {
  const auto* bytes = static_cast<const std::byte*>(p);
  return {load_quarter<Quarter>(bytes), load_quarter<Quarter>(bytes + 16),
          load_quarter<Quarter>(bytes + 32), load_quarter<Quarter>(bytes + 48)};
}
template <class Quarter>
inline void store_quarters(void* p, const Quarters<Quarter>& x) {
  __builtin_memcpy(p, &x, sizeof x);
}
inline F32x4 set1_quarter(float x) { return F32x4{x, x, x, x}; }

inline F32x16 set1(float x) {
  const F32x4 all = set1_quarter(x);
  return {all, all, all, all};
}
inline F32x16 zero() { return set1(0.0f); }
inline F32x16 load(const float* p) { return load_quarters<F32x4>(p); }
inline F32x16 load(const float* p, std::int64_t n) {
  if (n >= kLanes) return load(p);
  float whole[kLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
inline void store(float* p, F32x16 x) { store_quarters(p, x); }
inline void store(float* p, F32x16 x, std::int64_t n) {
  if (n >= kLanes) return store(p, x);
  float whole[kLanes];
  store(whole, x);
  for (std::int64_t i = 0; i < n; ++i) p[i] = whole[i];
}
// x in the first n lanes, `other` in the rest.
inline F32x16 select_first(std::int64_t n, F32x16 x, F32x16 other) {
  float lanes[kLanes], others[kLanes];
  store(lanes, x);
  store(others, other);
  for (std::int64_t i = n; i < kLanes; ++i) lanes[i] = others[i];
  return load(lanes);
}
inline F32x16 add(F32x16 a, F32x16 b) {
  return each([](F32x4 x, F32x4 y) { return x + y; }, a, b);
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  return each([](F32x4 x, F32x4 y) { return x - y; }, a, b);
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  return each([](F32x4 x, F32x4 y) { return x * y; }, a, b);
}
inline F32x16 div(F32x16 a, F32x16 b) {
  return each([](F32x4 x, F32x4 y) { return x / y; }, a, b);
}
// Rounded once or twice, as the CPU has it: a library's fused product would take a call per lane.
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return each([](F32x4 x, F32x4 y, F32x4 z) { return x * y + z; }, a, b, c);
}
// NaN in `b` is kept, as in the instruction of the wider sets.
inline F32x16 max(F32x16 a, F32x16 b) {
  return each([](F32x4 x, F32x4 y) { return x > y ? x : y; }, a, b);
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return each([](F32x4 x, F32x4 y) { return x < y ? x : y; }, a, b);
}
inline F32x4 abs_quarter(F32x4 x) { return (F32x4)((U32x4)x & 0x7FFFFFFFu); }
inline F32x16 abs(F32x16 a) { return each(abs_quarter, a); }
// Of non-negative numbers; unlike `max`, a NaN on either side wins, as its bits are the largest.
inline F32x16 max_or_nan(F32x16 a, F32x16 b) {
  return each([](F32x4 x, F32x4 y) { return (I32x4)x > (I32x4)y ? x : y; }, a, b);
}
inline float max_or_nan_of(F32x16 x) {
  std::int32_t bits[kLanes];
  store_quarters(bits, x);
  std::int32_t largest = bits[0];
  for (const std::int32_t lane : bits) largest = largest > lane ? largest : lane;
  float value;
  __builtin_memcpy(&value, &largest, sizeof value);
  return value;
}
// For |a| < 2^22: beyond 1.5 * 2^23 floats are whole numbers, and adding rounds to one.
inline F32x16 round_to_even(F32x16 a) {
  return each([](F32x4 x) { return (x + 12582912.0f) - 12582912.0f; }, a);
}
// `inside` where |x| < limit, else `outside`.
inline F32x16 select_within(F32x16 x, float limit, F32x16 inside, F32x16 outside) {
  return each([limit](F32x4 y, F32x4 in,
                      F32x4 out) { return abs_quarter(y) < set1_quarter(limit) ? in : out; },
              x, inside, outside);
}
inline I32x4 to_int32(F32x4 x) { return __builtin_convertvector(x, I32x4); }
// Lane i is table[the low four bits of index[i]].
inline F32x16 lookup(const float (&table)[16], F32x16 index) {
  std::uint32_t bits[kLanes];
  float values[kLanes];
  store_quarters(bits, index);
  for (int i = 0; i < kLanes; ++i) values[i] = table[bits[i] & 15];
  return load(values);
}
// x * 2^n for whole n of [-252, 254], by two factors: the exponent field holds no power below -126.
inline F32x16 scale_by_power(F32x16 x, F32x16 n) {
  return each(
      [](F32x4 y, F32x4 power) {
        // NaN is no integer, and `y` is one already.
        const I32x4 whole = to_int32(power == power ? power : set1_quarter(0.0f));
        const I32x4 first = whole >> 1;
        return y * (F32x4)((first + 127) << 23) * (F32x4)((whole - first + 127) << 23);
      },
      x, n);
}
inline float sum_of(F32x16 x) {
  const F32x4 four = (x.a + x.b) + (x.c + x.d);
  return (four[0] + four[1]) + (four[2] + four[3]);
}
inline float max_of(F32x16 x) {
  float lanes[kLanes];
  store(lanes, x);
  float largest = lanes[0];
  for (const float lane : lanes) largest = largest > lane ? largest : lane;
  return largest;
}

inline F32x16 load_bf16(const std::uint16_t* p) {
  std::uint32_t bits[kLanes];
  for (std::int64_t i = 0; i < kLanes; ++i) bits[i] = std::uint32_t{p[i]} << 16;
  return load_quarters<F32x4>(bits);
}
inline F32x16 load_bf16(const std::uint16_t* p, std::int64_t n) {
  if (n >= kLanes) return load_bf16(p);
  std::uint16_t whole[kLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) whole[i] = p[i];
  return load_bf16(whole);
}
// Round to nearest, ties to even, in the low 16 bits of each lane; a NaN stays one.
inline Quarters<U32x4> to_bf16(F32x16 x) {
  return each(
      [](F32x4 y) {
        const U32x4 bits = (U32x4)y;
        return (y == y ? bits + (((bits >> 16) & 1u) + 0x7FFFu) : bits | 0x00400000u) >> 16;
      },
      x);
}
inline void store_bf16(std::uint16_t* p, F32x16 x, std::int64_t n) {
  std::uint32_t bits[kLanes];
  store_quarters(bits, to_bf16(x));
  for (std::int64_t i = 0; i < n; ++i) p[i] = static_cast<std::uint16_t>(bits[i]);
}
inline void store_bf16(std::uint16_t* p, F32x16 x) { store_bf16(p, x, kLanes); }
// x holds whole numbers of [-127, 127]; NaN becomes 0.
inline void store_int8(std::int8_t* p, F32x16 x) {
  std::int32_t whole[kLanes];
  store_quarters(whole, each([](F32x4 y) { return to_int32(y == y ? y : set1_quarter(0.0f)); }, x));
  for (std::int64_t i = 0; i < kLanes; ++i) p[i] = static_cast<std::int8_t>(whole[i]);
}

inline I32x16 load_int32(const std::int32_t* p) { return load_quarters<I32x4>(p); }
inline void store_int32(std::int32_t* p, I32x16 x) { store_quarters(p, x); }
inline F32x16 to_float(I32x16 x) {
  return each([](I32x4 y) { return __builtin_convertvector(y, F32x4); }, x);
}
inline I32x16 subtract(I32x16 x, std::int32_t y) {
  return each([y](I32x4 z) { return z - y; }, x);
}

// Words of 32 bits, for counters and masks.
inline I32x16 set1_word(std::uint32_t x) {
  const I32x4 all = (I32x4)U32x4{x, x, x, x};
  return {all, all, all, all};
}
inline I32x16 word_lanes() {
  return {I32x4{0, 1, 2, 3}, I32x4{4, 5, 6, 7}, I32x4{8, 9, 10, 11}, I32x4{12, 13, 14, 15}};
}
inline I32x16 add_words(I32x16 a, I32x16 b) {
  return each([](I32x4 x, I32x4 y) { return (I32x4)((U32x4)x + (U32x4)y); }, a, b);
}
inline I32x16 exclusive_or(I32x16 a, I32x16 b) {
  return each([](I32x4 x, I32x4 y) { return x ^ y; }, a, b);
}
// All bits set where the highest is.
inline I32x16 spread_sign(I32x16 x) {
  return each([](I32x4 y) { return y >> 31; }, x);
}
inline I32x16 low_halves(I32x16 x) {
  return each([](I32x4 y) { return y & 0xFFFF; }, x);
}
inline I32x16 high_halves(I32x16 x) {
  return each([](I32x4 y) { return (I32x4)((U32x4)y >> 16); }, x);
}
// The low and high words of x * factor.
inline I32x16 multiply_wide(I32x16 x, std::uint32_t factor, I32x16* high) {
  std::uint32_t words[kLanes], above[kLanes];
  store_quarters(words, x);
  for (std::int64_t i = 0; i < kLanes; ++i) {
    const std::uint64_t product = std::uint64_t{words[i]} * factor;
    words[i] = static_cast<std::uint32_t>(product);
    above[i] = static_cast<std::uint32_t>(product >> 32);
  }
  *high = load_quarters<I32x4>(above);
  return load_quarters<I32x4>(words);
}

// Transposes 16 x 16 units: lane r of to[16 * c] is from[r * stride + c], for r < rows, c <
// columns; other lanes are zero. Used to turn keys into panels.
inline void transpose_units(const std::uint32_t* from, std::int64_t stride, std::int64_t rows,
                            std::int64_t columns, std::uint32_t* to) {
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t r = 0; r < kLanes; ++r) {
      to[kLanes * c + r] = r < rows ? from[r * stride + c] : 0;
    }
  }
}
// to[2 * i] = a[i], to[2 * i + 1] = b[i] for 16 values of 16 bits; lanes from n on are zero.
inline void interleave(const std::uint16_t* a, const std::uint16_t* b, std::int64_t n,
                       std::uint32_t* to) {
  for (std::int64_t i = 0; i < kLanes; ++i) {
    const std::uint32_t first = i < n ? a[i] : 0, second = i < n && b != nullptr ? b[i] : 0;
    to[i] = first | second << 16;
  }
}

// A Dot multiplies a token's broadcast unit with one panel step and adds to 16 sums.
struct DotFloat32 {
  using Sum = F32x16;
  using Panel = F32x16;
  using Unit = F32x4;
  static Sum zero_sum() { return zero(); }
  static Panel load(const std::byte* p) { return load_quarters<F32x4>(p); }
  static Unit broadcast(std::uint32_t unit) { return (F32x4)U32x4{unit, unit, unit, unit}; }
  static Sum step(Sum sum, Unit a, Panel b) {
    return each([a](F32x4 x, F32x4 y) { return x + a * y; }, sum, b);
  }
  static void store(float* p, Sum sum) { store_quarters(p, sum); }
};

struct DotBFloat16 {
  struct Pair {
    F32x4 even, odd;
  };
  using Sum = F32x16;
  using Panel = Quarters<Pair>;
  using Unit = Pair;
  static Pair split(U32x4 pairs) { return {(F32x4)(pairs << 16), (F32x4)(pairs & 0xFFFF0000u)}; }
  static Sum zero_sum() { return zero(); }
  static Panel load(const std::byte* p) { return each(split, load_quarters<U32x4>(p)); }
  static Unit broadcast(std::uint32_t unit) { return split(U32x4{unit, unit, unit, unit}); }
  static Sum step(Sum sum, Unit a, Panel b) {
    return each([a](F32x4 x, Pair y) { return x + a.even * y.even + a.odd * y.odd; }, sum, b);
  }
  static void store(float* p, Sum sum) { store_quarters(p, sum); }
};

// Weights are stored with 128 added, as unsigned bytes, as vec_avx512.h takes them. A product of
// [0, 255] and [-127, 127] fits 16 bits.
struct DotInt8 {
  struct Pair {
    I16x8 even, odd;
  };
  using Sum = I32x16;
  using Panel = Quarters<Pair>;
  using Unit = Pair;
  static Sum zero_sum() {
    return each([](F32x4 x) { return (I32x4)x; }, zero());
  }
  static Panel load(const std::byte* p) {
    return each(
        [](U32x4 bytes) {
          return Pair{(I16x8)(bytes & 0x00FF00FFu), (I16x8)(bytes >> 8 & 0x00FF00FFu)};
        },
        load_quarters<U32x4>(p));
  }
  static Unit broadcast(std::uint32_t unit) {
    const I16x8 bytes = (I16x8)U32x4{unit, unit, unit, unit};
    return {(bytes << 8) >> 8, bytes >> 8};
  }
  static I32x4 sum_of_pairs(I16x8 products) {
    const I32x4 both = (I32x4)products;
    return ((both << 16) >> 16) + (both >> 16);
  }
  static Sum step(Sum sum, Unit a, Panel b) {
    return each(
        [a](I32x4 x, Pair y) {
          return x + sum_of_pairs(a.even * y.even) + sum_of_pairs(a.odd * y.odd);
        },
        sum, b);
  }
  static void store(float* p, Sum sum) { store_quarters(p, sum); }
};
