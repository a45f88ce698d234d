// Activation, softmax, LayerNorm and int8 quantisation of rows, compiled once per instruction set.

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

template <int kCount>
inline F32x16 polynomial(const float (&highest_first)[kCount], F32x16 x) {
  F32x16 y = set1(highest_first[0]);
#pragma GCC unroll 16
  for (int i = 1; i < kCount; ++i) y = fma(y, x, set1(highest_first[i]));
  return y;
}

// 2^x for x <= 126; relative error under 2.3e-7 (2e-7 with fused products), zero far below.
inline F32x16 exp2_of(F32x16 x) {
  static constexpr float kPower[] = {1.326697064e-03f, 9.675459936e-03f, 5.550742522e-02f,
                                     2.402212173e-01f, 6.931469440e-01f, 1.000000119e+00f};
  const F32x16 clamped = max(set1(-151.0f), x);
  const F32x16 whole = round_to_even(clamped);
  return scale_by_power(polynomial(kPower, sub(clamped, whole)), whole);
}

struct Gelu {
  // x * (0.5 + 0.5 erf(x / sqrt 2)) = 0.5 x + |x| h(|x|) with h(a) = 0.5 erf(a / sqrt 2). The
  // interval |x| < 5.17 is cut into 16 pieces around the thirds i / 3, each with a polynomial in
  // 3 a - i whose coefficients are looked up by lane: within 1.3e-7 * max(1, |x|) of float64, at
  // half the multiplications of one polynomial for all. Beyond, it is max(0, x).
  F32x16 operator()(F32x16 x) const {
    alignas(64) static constexpr float kHalfErf[5][16] = {
        {4.963999163e-05f, 1.854865113e-04f, 2.780680952e-04f, 2.477343660e-04f, 1.374153362e-04f,
         1.964762851e-05f, -5.473894635e-05f, -7.648739120e-05f, -6.412503717e-05f,
         -4.110117879e-05f, -2.156665141e-05f, -9.551135008e-06f, -3.629432285e-06f,
         -1.195410846e-06f, -3.435566498e-07f, -8.656188299e-08f},
        {-2.483376535e-03f, -2.061234554e-03f, -1.093689934e-03f, -5.154400696e-06f,
         7.795376587e-04f, 1.085324679e-03f, 9.969364619e-04f, 7.193805068e-04f, 4.312126548e-04f,
         2.202782198e-04f, 9.724839765e-05f, 3.742485205e-05f, 1.262640126e-05f, 3.749507187e-06f,
         9.829011560e-07f, 2.279513467e-07f},
        {3.429549452e-06f, -6.988410372e-03f, -1.183118951e-02f, -1.344267838e-02f,
         -1.214888599e-02f, -9.210926481e-03f, -5.999089684e-03f, -3.399177687e-03f,
         -1.688310644e-03f, -7.386338548e-04f, -2.855936764e-04f, -9.782247798e-05f,
         -2.973428855e-05f, -8.031197467e-06f, -1.929536211e-06f, -4.126939928e-07f},
        {1.329805851e-01f, 1.257938147e-01f, 1.064825580e-01f, 8.065722883e-02f, 5.467051640e-02f,
         3.315944225e-02f, 1.799716987e-02f, 8.740630001e-03f, 3.798579564e-03f, 1.477194019e-03f,
         5.140312715e-04f, 1.600569667e-04f, 4.459538832e-05f, 1.111814800e-05f, 2.480267995e-06f,
         4.950905463e-07f},
        {0.0f, 1.305586547e-01f, 2.475074530e-01f, 3.413447440e-01f, 4.087887704e-01f,
         4.522096515e-01f, 4.772498608e-01f, 4.901846647e-01f, 4.961696267e-01f, 4.986501038e-01f,
         4.995709360e-01f, 4.998771250e-01f, 4.999683201e-01f, 4.999926686e-01f, 4.999984801e-01f,
         4.999997020e-01f}};
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: rounds a sum to whole numbers, in its bits
    const F32x16 a = abs(x);
    const F32x16 piece = fma(a, set1(3.0f), set1(kMagic));
    const F32x16 at = fma(a, set1(3.0f), sub(set1(kMagic), piece));
    F32x16 h = lookup(kHalfErf[0], piece);
#pragma GCC unroll 4
    for (int i = 1; i < 5; ++i) h = fma(h, at, lookup(kHalfErf[i], piece));
    const F32x16 inside = fma(a, h, mul(x, set1(0.5f)));
    return select_within(x, 15.5f / 3.0f, inside, max(zero(), x));
  }
};

struct GeluTanh {
  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
  F32x16 operator()(F32x16 x) const {
    const float scale = -2.0f * 0.7978845608f * 1.4426950409f;
    const F32x16 cubic = fma(mul(x, x), set1(0.044715f * scale), set1(scale));
    const F32x16 power = exp2_of(min(set1(126.0f), mul(x, cubic)));
    return select_within(x, 10.0f, div(x, add(set1(1.0f), power)), max(zero(), x));
  }
};

struct Relu {
  F32x16 operator()(F32x16 x) const { return max(zero(), x); }
};

template <class Function>
void with_activation(Activation activation, Function&& function) {
  switch (activation) {
    case Activation::kGelu:
      return function(Gelu{});
    case Activation::kGeluTanh:
      return function(GeluTanh{});
    case Activation::kRelu:
      return function(Relu{});
  }
}

// The first bfloat16 of a unit, and of each of the 16 units of a panel step.
inline float low_of(std::uint32_t unit) {
  const std::uint32_t bits = unit << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline F32x16 low_of_step(const std::byte* step) {
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    std::uint32_t unit;
    __builtin_memcpy(&unit, step + 4 * i, sizeof unit);
    values[i] = low_of(unit);
  }
  return load(values);
}

inline F32x16 load_element(Element element, const void* base, std::int64_t at, std::int64_t n) {
  if (element == Element::kFloat32) return load(static_cast<const float*>(base) + at, n);
  return load_bf16(static_cast<const std::uint16_t*>(base) + at, n);
}

inline void store_element(Element element, void* base, std::int64_t at, F32x16 x, std::int64_t n) {
  if (element == Element::kFloat32) return store(static_cast<float*>(base) + at, x, n);
  store_bf16(static_cast<std::uint16_t*>(base) + at, x, n);
}

// LayerNorm(sums * scale + bias + residual) of `kRows` rows, whose sums run side by side: on its
// own a row waits for each addition. Mean and variance in two passes, as the textbook has it: one
// pass loses digits where the mean is large.
template <int kRows>
inline void norm_few(const NormWeights& norm, const Rows& rows, std::int64_t first,
                     std::int64_t hidden_size, float* sums) {
  const std::int64_t stride = round_up(hidden_size, kLanes);
  F32x16 total[kRows], squares[kRows], mean[kRows], inverse[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) total[r] = squares[r] = zero();
  for (std::int64_t c = 0; c < hidden_size; c += kLanes) {
    const std::int64_t n = smaller(kLanes, hidden_size - c);
    const F32x16 bias = load(norm.bias + c);
    const F32x16 scale = norm.scale == nullptr ? set1(1.0f) : load(norm.scale + c);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t at = (first + r) * hidden_size + c;
      const F32x16 added = add(bias, load_element(rows.element, rows.hidden, at, n));
      const F32x16 x = fma(load(sums + r * stride + c), scale, added);
      const F32x16 kept = n == kLanes ? x : select_first(n, x, zero());
      store(sums + r * stride + c, kept);
      total[r] = add(total[r], kept);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    mean[r] = set1(sum_of(total[r]) / static_cast<float>(hidden_size));
  for (std::int64_t c = 0; c < hidden_size; c += kLanes) {
    const std::int64_t n = smaller(kLanes, hidden_size - c);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32x16 difference = sub(load(sums + r * stride + c), mean[r]);
      const F32x16 kept = n == kLanes ? difference : select_first(n, difference, zero());
      squares[r] = fma(kept, kept, squares[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float variance = sum_of(squares[r]) / static_cast<float>(hidden_size);
    inverse[r] = set1(1.0f / __builtin_sqrtf(variance + norm.eps));
  }
  for (std::int64_t c = 0; c < hidden_size; c += kLanes) {
    const std::int64_t n = smaller(kLanes, hidden_size - c);
    const F32x16 weight = load(norm.norm_weight + c), bias = load(norm.norm_bias + c);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32x16 normed = mul(sub(load(sums + r * stride + c), mean[r]), inverse[r]);
      store_element(rows.element, rows.output, (first + r) * hidden_size + c,
                    fma(normed, weight, bias), n);
    }
  }
}

// The same of rows [first, last); `sums` [last - first][C16] is overwritten.
inline void norm_rows(const NormWeights& norm, const Rows& rows, std::int64_t first,
                      std::int64_t last, std::int64_t hidden_size, float* sums) {
  constexpr int kRows = 4;
  const std::int64_t stride = round_up(hidden_size, kLanes);
  std::int64_t row = first;
  for (; row + kRows <= last; row += kRows, sums += kRows * stride) {
    norm_few<kRows>(norm, rows, row, hidden_size, sums);
  }
  for (; row < last; ++row, sums += stride) norm_few<1>(norm, rows, row, hidden_size, sums);
}

// Largest magnitude of a row; NaN if there is one in it.
inline float largest_of(const float* x, std::int64_t count) {
  F32x16 largest = zero();
  for (std::int64_t i = 0; i < count; i += kLanes) {
    largest = max_or_nan(largest, abs(load(x + i, smaller(kLanes, count - i))));
  }
  return max_or_nan_of(largest);
}

// The Hadamard transform of kVectors neighbouring vectors, in registers: `count` elements are left,
// which only a vector on its own may exceed. Returns their largest magnitudes.
template <int kVectors>
inline F32x16 spread_block(Element element, const void* base, std::int64_t at, std::int64_t count,
                           float* to) {
  F32x16 x[kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    const std::int64_t n = kVectors == 1 ? smaller(kLanes, count) : kLanes;
    x[i] = load_element(element, base, at + i * kLanes, n);
  }
#pragma GCC unroll 4
  for (int stride = 1; stride < kVectors; stride *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      if ((i & stride) != 0) continue;
      const F32x16 first = x[i], second = x[i + stride];
      x[i] = add(first, second);
      x[i + stride] = sub(first, second);
    }
  }
  F32x16 largest = zero();
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) {
    store(to + i * kLanes, x[i]);
    largest = max_or_nan(largest, abs(x[i]));
  }
  return largest;
}

// One token as floats, `spread` vectors mixed at a time; returns its largest magnitude, or NaN if
// there is one in it.
//   to  [round_up(count, 16)]
template <int kVectors = kMostSpread>
float spread_row(Element element, const void* base, std::int64_t at, std::int64_t count,
                 std::int64_t spread, float* to) {
  if constexpr (kVectors > 1) {
    if (spread < kVectors) {
      return spread_row<kVectors / 2>(element, base, at, count, spread, to);
    }
  }
  F32x16 largest = zero();
  for (std::int64_t i = 0; i < count; i += kVectors * kLanes) {
    largest = max_or_nan(largest, spread_block<kVectors>(element, base, at + i, count - i, to + i));
  }
  return max_or_nan_of(largest);
}

// Symmetric int8 of one row: q = round(x * 127 / limit) with limit = max|x|, zeros up to `padded`
// (a multiple of 16). Returns the scale; `offset` is what unsigned weights make of each product:
// 128 * sum(q). A NaN in the row makes the scale NaN, and with it every product of the row.
inline float quantize_row(const float* x, float limit, std::int64_t count, std::int64_t padded,
                          std::int8_t* q, std::int32_t* offset) {
  // Below 3.7e-37 the quotient would be infinite, which no integer is.
  const float ratio = limit == 0.0f ? 0.0f : 127.0f / limit;
  const F32x16 inverse = set1(ratio > __FLT_MAX__ ? __FLT_MAX__ : ratio);
  F32x16 total = zero();
  for (std::int64_t i = 0; i < padded; i += kLanes) {
    const std::int64_t n = larger(0, smaller(kLanes, count - i));
    const F32x16 rounded = n > 0 ? round_to_even(mul(load(x + i, n), inverse)) : zero();
    store_int8(q + i, rounded);
    total = add(total, rounded);
  }
  // Exact in float32: at most 2^24 / 127 values a lane.
  const float sum = sum_of(total);
  *offset = sum == sum ? 128 * static_cast<std::int32_t>(sum) : 0;
  return limit / 127.0f;
}

// Tokens in the form products take them: rows of units, and for int8 each row's scale and offset.
struct Tokens {
  const std::uint32_t* units;
  std::int64_t stride;  // units
  const float* scales = nullptr;
  const std::int32_t* offsets = nullptr;

  Tokens from(std::int64_t row) const {
    const Tokens rest{units + row * stride, stride};
    return scales == nullptr ? rest : Tokens{rest.units, stride, scales + row, offsets + row};
  }
};

// Rows of `count` elements as units of `compute`, zeros up to `stride` units.
//   spread  vectors that int8 mixes before it quantises; 1 for none
inline Tokens stage_tokens(Compute compute, Element element, const void* base, std::int64_t count,
                           std::int64_t first, std::int64_t last, ScratchFrame& frame,
                           std::int64_t spread = 1) {
  const std::int64_t units = ceil_div(count, per_unit(compute));
  const bool as_is = count % per_unit(compute) == 0 &&
                     reinterpret_cast<std::uintptr_t>(base) % sizeof(std::uint32_t) == 0 &&
                     ((compute == Compute::kFloat32 && element == Element::kFloat32) ||
                      (compute == Compute::kBFloat16 && element == Element::kBFloat16));
  if (as_is) {
    return {static_cast<const std::uint32_t*>(base) + first * units, units, nullptr, nullptr};
  }
  const std::int64_t padded = round_up(count, kLanes), stride = padded / per_unit(compute);
  const std::int64_t rows = last - first;
  auto* staged = static_cast<std::uint32_t*>(frame.take(rows * stride * sizeof(std::uint32_t)));
  auto* scales = static_cast<float*>(frame.take(rows * sizeof(float)));
  auto* offsets = static_cast<std::int32_t*>(frame.take(rows * sizeof(std::int32_t)));
  auto* wide = static_cast<float*>(frame.take(padded * sizeof(float)));
  for (std::int64_t row = 0; row < rows; ++row) {
    std::uint32_t* to = staged + row * stride;
    const std::int64_t at = (first + row) * count;
    if (compute == Compute::kInt8) {
      const float limit = spread_row(element, base, at, count, spread, wide);
      scales[row] = quantize_row(wide, limit, count, padded, reinterpret_cast<std::int8_t*>(to),
                                 offsets + row);
      continue;
    }
    for (std::int64_t i = 0; i < padded; i += kLanes) {
      const F32x16 x = load_element(element, base, at + i, smaller(kLanes, count - i));
      if (compute == Compute::kFloat32) {
        store(reinterpret_cast<float*>(to) + i, x);
      } else {
        store_bf16(reinterpret_cast<std::uint16_t*>(to) + i, x);
      }
    }
  }
  return {staged, stride, scales, offsets};
}
