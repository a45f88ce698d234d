// The feed-forward sublayer in training, compiled once per instruction set.
//
// As in inference, a block of tokens goes through the neurons group by group, and the activations
// of a group stay in cache. Only the pre-activation is kept for the gradient, which computes the
// activation and its derivative from it.

struct GeluDerivative {
  // 0.5 + x * P(2 x^2 / 5.6^2 - 1), fitted to cdf(x) + x * density(x): within 3.5e-7. Beyond 5.6 it
  // is 0 or 1.
  F32x16 operator()(F32x16 x) const {
    static constexpr float kOdd[] = {3.167044139e-03f,  -8.000606671e-03f, 4.184897523e-03f,
                                     -2.595419763e-03f, 2.042268775e-02f,  -3.816161677e-02f,
                                     4.266068339e-02f,  -5.165337399e-02f, 6.661056727e-02f,
                                     -7.375113666e-02f, 7.162962109e-02f,  -6.488230824e-02f,
                                     5.668487400e-02f,  -5.097242445e-02f, 5.180796236e-02f,
                                     -6.428230554e-02f, 1.264166385e-01f};
    const F32x16 u = fma(mul(x, x), set1(2.0f / (5.6f * 5.6f)), set1(-1.0f));
    const F32x16 step = sub(set1(1.0f), select_within(max(zero(), x), 1.0f, set1(1.0f), zero()));
    return select_within(x, 5.6f, fma(x, polynomial(kOdd, u), set1(0.5f)), step);
  }
};

struct GeluTanhDerivative {
  // s + x s (1 - s) v' with s = 1 / (1 + exp(-v)) and v = 2 sqrt(2 / pi) (x + 0.044715 x^3).
  F32x16 operator()(F32x16 x) const {
    const float scale = 2.0f * 0.7978845608f;
    const F32x16 square = mul(x, x);
    const F32x16 v = mul(x, fma(square, set1(0.044715f * scale), set1(scale)));
    const F32x16 slope = fma(square, set1(3.0f * 0.044715f * scale), set1(scale));
    const F32x16 power = exp2_of(min(set1(126.0f), mul(v, set1(-1.4426950409f))));
    const F32x16 s = div(set1(1.0f), add(set1(1.0f), power));
    const F32x16 inside = fma(mul(x, s), mul(mul(s, power), slope), s);
    const F32x16 step = sub(set1(1.0f), select_within(max(zero(), x), 1.0f, set1(1.0f), zero()));
    return select_within(x, 10.0f, inside, step);
  }
};

struct ReluDerivative {
  F32x16 operator()(F32x16 x) const {
    // No positive float is below the smallest.
    return sub(set1(1.0f), select_within(max(zero(), x), __FLT_DENORM_MIN__, set1(1.0f), zero()));
  }
};

// function(activation, its derivative)
template <class Function>
void with_derivative(Activation activation, Function&& function) {
  switch (activation) {
    case Activation::kGelu:
      return function(Gelu{}, GeluDerivative{});
    case Activation::kGeluTanh:
      return function(GeluTanh{}, GeluTanhDerivative{});
    case Activation::kRelu:
      return function(Relu{}, ReluDerivative{});
  }
}

// Panels of the outputs from `first` on; `first` is a multiple of 16.
inline Operand outputs_from(const Operand& operand, std::int64_t first) {
  return {operand.data + first / kLanes * operand.panel_bytes, operand.panel_bytes};
}

template <class Dot>
void ffn_forward(const FfnForwardArgs& args, std::int64_t first, std::int64_t last) {
  const TailArgs& tail = args.tail;
  const std::int64_t rows = last - first, size = tail.hidden_size, c16 = round_up(size, kLanes);
  ScratchFrame frame;
  const Tokens tokens =
      stage_matrix<Dot>({tail.rows.element, tail.rows.hidden, size}, size, first, last, frame);
  auto* sums = static_cast<float*>(frame.take(rows * c16 * sizeof(float)));
  void* inner = frame.take(rows * kNeuronGroup * sizeof(float));
  for (std::int64_t base = 0; base < args.neurons; base += kNeuronGroup) {
    const std::int64_t neurons = smaller(kNeuronGroup, args.neurons - base);
    with_activation(args.activation, [&](auto activate) {
      multiply<Dot>(
          tokens, rows, panels_of(outputs_from(args.up, base), ceil_div(size, kUnit<Dot>)), 0,
          ceil_div(neurons, kLanes),
          [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
              std::int64_t width) {
            for (std::int64_t p = 0; p < width; ++p) {
              const std::int64_t at = (panel + p) * kLanes;
              const std::int64_t live = smaller(kLanes, neurons - at);
              const F32x16 bias = load(args.up_bias + base + at);
              for (std::int64_t r = 0; r < count; ++r) {
                const F32x16 x = add(load(tile.row(r, p)), bias);
                store_element(kElementOf<Dot>, args.pre_activation,
                              (first + row + r) * args.up_stride + base + at, x, live);
                F32x16 y = activate(x);
                if (live < kLanes) y = select_first(live, y, zero());
                store_element(kElementOf<Dot>, inner, (row + r) * kNeuronGroup + at, y, kLanes);
              }
            }
          });
    });
    add_product<Dot>(static_cast<const std::uint32_t*>(inner), kNeuronGroup / kUnit<Dot>, rows,
                     args.down, base, neurons, c16, base == 0, sums, c16);
  }
  tail_rows(tail, first, last, sums);
}

template <class Dot>
void ffn_backward(const FfnBackwardArgs& args, std::int64_t first, std::int64_t last) {
  const std::int64_t rows = last - first, size = args.hidden_size, c16 = round_up(size, kLanes);
  constexpr Element kElement = kElementOf<Dot>;
  constexpr std::int64_t kBytes = 4 / kUnit<Dot>;
  ScratchFrame frame;
  auto* sums = static_cast<float*>(frame.take(rows * c16 * sizeof(float)));
  const std::int64_t stride = c16 / kUnit<Dot>;
  const auto* upstream = static_cast<const std::uint32_t*>(args.product_gradient) + first * stride;
  for (std::int64_t base = 0; base < args.neurons; base += kNeuronGroup) {
    const std::int64_t neurons = smaller(kNeuronGroup, args.neurons - base);
    with_derivative(args.activation, [&](auto activate, auto derive) {
      multiply<Dot>({upstream, stride}, rows,
                    panels_of(outputs_from(args.down_by_neuron, base), ceil_div(size, kUnit<Dot>)),
                    0, ceil_div(neurons, kLanes),
                    [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
                        std::int64_t width) {
                      for (std::int64_t r = 0; r < count; ++r) {
                        const std::int64_t token = first + row + r;
                        // The next round of panels reads and writes a row where this one ends. Rows
                        // lie too far apart for the hardware to foresee it, and waiting takes as
                        // long as the product. Not a function: GCC drops calls that only prefetch.
                        const std::int64_t next = base + (panel + kTilePanels) * kLanes;
                        const auto* read = static_cast<const std::byte*>(args.pre_activation) +
                                           (token * args.up_stride + next) * kBytes;
                        auto* gradients = static_cast<std::byte*>(args.up_gradient) +
                                          (token * args.inner_stride + next) * kBytes;
                        auto* actives = static_cast<std::byte*>(args.active) +
                                        (token * args.inner_stride + next) * kBytes;
                        for (std::int64_t i = 0; i < kTilePanels * kLanes * kBytes; i += 64) {
                          __builtin_prefetch(read + i);
                          __builtin_prefetch(gradients + i, 1);
                          __builtin_prefetch(actives + i, 1);
                        }
                        for (std::int64_t p = 0; p < width; ++p) {
                          const std::int64_t at = base + (panel + p) * kLanes;
                          const std::int64_t live = smaller(kLanes, args.neurons - at);
                          const F32x16 x = load_element(kElement, args.pre_activation,
                                                        token * args.up_stride + at, live);
                          F32x16 gradient = mul(load(tile.row(r, p)), derive(x));
                          if (live < kLanes) gradient = select_first(live, gradient, zero());
                          const std::int64_t to = token * args.inner_stride + at;
                          store_element(kElement, args.up_gradient, to, gradient, kLanes);
                          store_element(kElement, args.active, to, activate(x), kLanes);
                        }
                      }
                    });
    });
    const std::int64_t inner_stride = args.inner_stride / kUnit<Dot>;
    add_product<Dot>(static_cast<const std::uint32_t*>(args.up_gradient) + first * inner_stride +
                         base / kUnit<Dot>,
                     inner_stride, rows, args.up, base, neurons, c16, base == 0, sums, c16);
  }
  store_hidden_gradient(size, args.element, args.total_gradient, first, last, sums,
                        args.hidden_gradient);
}
