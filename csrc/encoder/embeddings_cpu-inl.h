// Embedding rows of one block of tokens, compiled once per instruction set.

template <class Function>
void with_lanes(std::int64_t count, Function&& function) {
  std::int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) function(c, kLanes);
  if (c < count) function(c, count - c);
}

inline F32x16 first_of(F32x16 x, std::int64_t n) {
  return n == kLanes ? x : select_first(n, x, zero());
}

struct Floats32 {
  using Value = float;
  static F32x16 get(const float* p, std::int64_t n) { return n == kLanes ? load(p) : load(p, n); }
  static void put(float* p, F32x16 x, std::int64_t n) {
    return n == kLanes ? store(p, x) : store(p, x, n);
  }
};
struct Floats16 {
  using Value = std::uint16_t;
  static F32x16 get(const std::uint16_t* p, std::int64_t n) {
    return n == kLanes ? load_bf16(p) : load_bf16(p, n);
  }
  static void put(std::uint16_t* p, F32x16 x, std::int64_t n) {
    return n == kLanes ? store_bf16(p, x) : store_bf16(p, x, n);
  }
};

template <class Format>
void embed_rows_of(const EmbeddingArgs& args, std::int64_t first, std::int64_t last, float* sums) {
  using Value = typename Format::Value;
  const std::int64_t size = args.hidden_size;
  const auto row_of = [size](const void* table, std::int64_t row) {
    return static_cast<const Value*>(table) + row * size;
  };
  for (std::int64_t t = first; t < last; ++t) {
    const Value* word = row_of(args.word, args.rows[t].word);
    const Value* position = row_of(args.position, args.rows[t].position);
    const Value* segment = row_of(args.segment, args.rows[t].segment);
    // Words lie anywhere in a table far larger than the caches.
    const std::int64_t ahead = smaller(t + kRowsAhead, last - 1);
    const auto* next = reinterpret_cast<const std::byte*>(row_of(args.word, args.rows[ahead].word));
    for (std::int64_t at = 0; at < size * std::int64_t{sizeof(Value)}; at += kStepBytes) {
      __builtin_prefetch(next + at);
    }
    F32x16 total = zero();
    with_lanes(size, [&](std::int64_t c, std::int64_t n) {
      const F32x16 x = first_of(add(add(Format::get(word + c, n), Format::get(segment + c, n)),
                                    Format::get(position + c, n)),
                                n);
      store(sums + c, x);
      total = add(total, x);
    });
    const F32x16 mean = set1(sum_of(total) / static_cast<float>(size));
    F32x16 squares = zero();
    with_lanes(size, [&](std::int64_t c, std::int64_t n) {
      const F32x16 difference = first_of(sub(load(sums + c), mean), n);
      squares = fma(difference, difference, squares);
    });
    const float variance = sum_of(squares) / static_cast<float>(size);
    const F32x16 inverse = set1(1.0f / __builtin_sqrtf(variance + args.eps));
    const Value* weight = row_of(args.norm_weight, 0);
    const Value* bias = row_of(args.norm_bias, 0);
    Value* to = static_cast<Value*>(args.output) + t * size;
    with_lanes(size, [&](std::int64_t c, std::int64_t n) {
      const F32x16 normed = mul(sub(load(sums + c), mean), inverse);
      Format::put(to + c, fma(normed, Format::get(weight + c, n), Format::get(bias + c, n)), n);
    });
  }
}

void embed_rows(const EmbeddingArgs& args, std::int64_t first, std::int64_t last, float* sums) {
  if (args.element == Element::kFloat32) return embed_rows_of<Floats32>(args, first, last, sums);
  embed_rows_of<Floats16>(args, first, last, sums);
}
