// What both sublayers share in training: the tail with its gradient, and products of whole rows.

// `sums` is overwritten.
inline void tail_row(const TailArgs& args, std::int64_t row, float* sums, float* keep) {
  const std::int64_t size = args.hidden_size, at = row * size;
  if (args.dropout.is_on) keep_hidden(args.dropout, row, size, keep);
  F32x16 total = zero();
  for (std::int64_t c = 0; c < size; c += kLanes) {
    const std::int64_t n = smaller(kLanes, size - c);
    F32x16 x = add(load(sums + c), load(args.bias + c));
    if (args.dropout.is_on) x = mul(x, load(keep + c));
    x = add(x, load_element(args.rows.element, args.rows.hidden, at + c, n));
    if (n < kLanes) x = select_first(n, x, zero());
    store(sums + c, x);
    store(args.total + at + c, x, n);
    total = add(total, x);
  }
  const F32x16 mean = set1(sum_of(total) / static_cast<float>(size));
  F32x16 squares = zero();
  for (std::int64_t c = 0; c < size; c += kLanes) {
    const std::int64_t n = smaller(kLanes, size - c);
    F32x16 difference = sub(load(sums + c), mean);
    if (n < kLanes) difference = select_first(n, difference, zero());
    squares = fma(difference, difference, squares);
  }
  const float variance = sum_of(squares) / static_cast<float>(size);
  const F32x16 inverse = set1(1.0f / __builtin_sqrtf(variance + args.eps));
  for (std::int64_t c = 0; c < size; c += kLanes) {
    const F32x16 normed = mul(sub(load(sums + c), mean), inverse);
    store_element(args.rows.element, args.rows.output, at + c,
                  fma(normed, load(args.norm_weight + c), load(args.norm_bias + c)),
                  smaller(kLanes, size - c));
  }
}

inline void tail_rows(const TailArgs& args, std::int64_t first, std::int64_t last, float* sums) {
  const std::int64_t c16 = round_up(args.hidden_size, kLanes);
  ScratchFrame frame;
  auto* keep = static_cast<float*>(frame.take(keep_size(args.hidden_size) * sizeof(float)));
  for (std::int64_t row = first; row < last; ++row) {
    tail_row(args, row, sums + (row - first) * c16, keep);
  }
}

// The gradient of the tail of one chunk of tokens.
template <class Dot>
void tail_backward(const TailBackwardArgs& args, std::int64_t chunk) {
  const std::int64_t size = args.hidden_size, c16 = round_up(size, kLanes);
  const std::int64_t first = chunk * kNormChunk;
  const std::int64_t last = smaller(first + kNormChunk, args.num_tokens);
  ScratchFrame frame;
  auto* keep = static_cast<float*>(frame.take(keep_size(size) * sizeof(float)));
  auto* normed = static_cast<float*>(frame.take(c16 * sizeof(float)));
  auto* inner = static_cast<float*>(frame.take(c16 * sizeof(float)));
  float* bias = args.partial + chunk * 3 * c16;
  float *weight = bias + c16, *shift = weight + c16;
  for (std::int64_t c = 0; c < 3 * c16; c += kLanes) store(bias + c, zero());
  const float share = 1.0f / static_cast<float>(size);
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t at = row * size;
    if (args.dropout.is_on) keep_hidden(args.dropout, row, size, keep);
    F32x16 sum = zero();
    for (std::int64_t c = 0; c < size; c += kLanes) {
      sum = add(sum, load(args.total + at + c, smaller(kLanes, size - c)));
    }
    const F32x16 mean = set1(sum_of(sum) * share);
    F32x16 squares = zero();
    for (std::int64_t c = 0; c < size; c += kLanes) {
      const std::int64_t n = smaller(kLanes, size - c);
      F32x16 difference = sub(load(args.total + at + c, n), mean);
      if (n < kLanes) difference = select_first(n, difference, zero());
      store(normed + c, difference);
      squares = fma(difference, difference, squares);
    }
    const F32x16 inverse = set1(1.0f / __builtin_sqrtf(sum_of(squares) * share + args.eps));
    F32x16 sum_inner = zero(), sum_product = zero();
    for (std::int64_t c = 0; c < size; c += kLanes) {
      // Past the end both are zero, and add nothing to any sum.
      const F32x16 upstream =
          load_element(args.element, args.gradient, at + c, smaller(kLanes, size - c));
      const F32x16 x = mul(load(normed + c), inverse);
      const F32x16 g = mul(upstream, load(args.norm_weight + c));
      store(normed + c, x);
      store(inner + c, g);
      store(weight + c, fma(upstream, x, load(weight + c)));
      store(shift + c, add(upstream, load(shift + c)));
      sum_inner = add(sum_inner, g);
      sum_product = fma(g, x, sum_product);
    }
    const F32x16 mean_inner = set1(sum_of(sum_inner) * share);
    const F32x16 mean_product = set1(sum_of(sum_product) * share);
    for (std::int64_t c = 0; c < size; c += kLanes) {
      const std::int64_t n = smaller(kLanes, size - c);
      F32x16 g = sub(sub(load(inner + c), mean_inner), mul(load(normed + c), mean_product));
      g = mul(g, inverse);
      if (n < kLanes) g = select_first(n, g, zero());
      store(args.total_gradient + row * c16 + c, g);
      if (args.dropout.is_on) g = mul(g, load(keep + c));
      if (n < kLanes) g = select_first(n, g, zero());
      store_element(kElementOf<Dot>, args.product_gradient, row * c16 + c, g, kLanes);
      store(bias + c, add(load(bias + c), g));
    }
  }
}

template <class Dot>
Tokens stage_matrix(const Matrix& matrix, std::int64_t inputs, std::int64_t first,
                    std::int64_t last, ScratchFrame& frame) {
  if (matrix.element == kElementOf<Dot> && matrix.stride % kUnit<Dot> == 0 &&
      (inputs % kUnit<Dot> == 0 || matrix.stride >= round_up(inputs, kLanes))) {
    const std::int64_t stride = matrix.stride / kUnit<Dot>;
    return {static_cast<const std::uint32_t*>(matrix.data) + first * stride, stride, nullptr,
            nullptr};
  }
  return stage_tokens(kComputeOf<Dot>, matrix.element, matrix.data, matrix.stride, first, last,
                      frame);
}

template <class Dot>
void project(const ProjectArgs& args, std::int64_t first, std::int64_t last) {
  ScratchFrame frame;
  const Tokens tokens = stage_matrix<Dot>(args.tokens, args.inputs, first, last, frame);
  multiply<Dot>(tokens, last - first, panels_of(args.weights, ceil_div(args.inputs, kUnit<Dot>)), 0,
                ceil_div(args.outputs, kLanes),
                [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
                    std::int64_t width) {
                  for (std::int64_t p = 0; p < width; ++p) {
                    const std::int64_t at = (panel + p) * kLanes;
                    const F32x16 bias = args.bias == nullptr ? zero() : load(args.bias + at);
                    for (std::int64_t r = 0; r < count; ++r) {
                      store_element(
                          kElementOf<Dot>, args.to, (first + row + r) * args.to_stride + at,
                          add(load(tile.row(r, p)), bias), smaller(kLanes, args.outputs - at));
                    }
                  }
                });
}

template <class Dot>
void project_tail(const ProjectTailArgs& args, std::int64_t first, std::int64_t last) {
  const std::int64_t rows = last - first, c16 = round_up(args.tail.hidden_size, kLanes);
  ScratchFrame frame;
  auto* sums = static_cast<float*>(frame.take(rows * c16 * sizeof(float)));
  const Tokens tokens = stage_matrix<Dot>(args.tokens, args.inputs, first, last, frame);
  product_of_rows<Dot>(tokens.units, tokens.stride, rows, args.weights, args.inputs, c16, sums,
                       c16);
  tail_rows(args.tail, first, last, sums);
}

// hidden_gradient = sums + total_gradient.
inline void store_hidden_gradient(std::int64_t size, Element element, const float* total_gradient,
                                  std::int64_t first, std::int64_t last, const float* sums,
                                  void* hidden_gradient) {
  const std::int64_t c16 = round_up(size, kLanes);
  for (std::int64_t row = first; row < last; ++row) {
    for (std::int64_t c = 0; c < size; c += kLanes) {
      store_element(element, hidden_gradient, row * size + c,
                    add(load(sums + (row - first) * c16 + c), load(total_gradient + row * c16 + c)),
                    smaller(kLanes, size - c));
    }
  }
}

template <class Dot>
void project_hidden(const ProjectHiddenArgs& args, std::int64_t first, std::int64_t last) {
  const std::int64_t rows = last - first, c16 = round_up(args.hidden_size, kLanes);
  ScratchFrame frame;
  auto* sums = static_cast<float*>(frame.take(rows * c16 * sizeof(float)));
  const Tokens tokens = stage_matrix<Dot>(args.tokens, args.inputs, first, last, frame);
  product_of_rows<Dot>(tokens.units, tokens.stride, rows, args.weights, args.inputs, c16, sums,
                       c16);
  store_hidden_gradient(args.hidden_size, args.element, args.total_gradient, first, last, sums,
                        args.hidden_gradient);
}
