// Matrices as operands of products, packed anew in every training step; compiled once per
// instruction set.

template <class Dot>
constexpr Compute kComputeOf =
    std::is_same_v<Dot, DotBFloat16> ? Compute::kBFloat16 : Compute::kFloat32;
template <class Dot>
constexpr std::int64_t kUnit = per_unit(kComputeOf<Dot>);
template <class Dot>
constexpr Element kElementOf =
    std::is_same_v<Dot, DotBFloat16> ? Element::kBFloat16 : Element::kFloat32;

template <class Function>
void with_float_dot(Compute compute, Function&& function) {
  if (compute == Compute::kBFloat16) return function(DotBFloat16{});
  function(DotFloat32{});
}

// Steps [first, last), at most 16 of them, of the 16 or fewer columns from `column` on, where the
// matrix has `inputs` rows: to[step][16] units.
template <class Dot>
void columns_to_units(const Matrix& matrix, std::int64_t inputs, std::int64_t column,
                      std::int64_t columns, std::int64_t first, std::int64_t last,
                      std::uint32_t* to) {
  for (std::int64_t step = first; step < last; ++step, to += kLanes) {
    const std::int64_t row = step * kUnit<Dot>, at = row * matrix.stride + column;
    if constexpr (kUnit<Dot> == 1) {
      store(reinterpret_cast<float*>(to), load_element(matrix.element, matrix.data, at, columns));
    } else {
      const bool has_second = row + 1 < inputs;
      if (matrix.element == Element::kBFloat16) {
        const auto* values = static_cast<const std::uint16_t*>(matrix.data) + at;
        interleave(values, has_second ? values + matrix.stride : nullptr, columns, to);
      } else {
        const auto* values = static_cast<const float*>(matrix.data) + at;
        std::uint16_t rounded[2][kLanes];
        store_bf16(rounded[0], load(values, columns));
        if (has_second) store_bf16(rounded[1], load(values + matrix.stride, columns));
        interleave(rounded[0], has_second ? rounded[1] : nullptr, kLanes, to);
      }
    }
  }
}

template <class Dot>
void pack_inputs(const Matrix& matrix, std::int64_t inputs, std::int64_t outputs,
                 std::int64_t first, std::int64_t last, const Operand& panels) {
  for (std::int64_t step = first; step < last; step += kLanes) {
    for (std::int64_t column = 0; column < outputs; column += kLanes) {
      columns_to_units<Dot>(
          matrix, inputs, column, smaller(kLanes, outputs - column), step,
          smaller(step + kLanes, last),
          reinterpret_cast<std::uint32_t*>(panels.data + column / kLanes * panels.panel_bytes +
                                           step * kStepBytes));
    }
  }
}

template <class Dot>
void pack_outputs(const Matrix& matrix, std::int64_t outputs, std::int64_t inputs,
                  std::int64_t first, std::int64_t last, const Operand& panels) {
  constexpr std::int64_t kSpan = kLanes * kUnit<Dot>;
  alignas(64) std::uint32_t units[kLanes * kLanes];
  for (std::int64_t panel = first; panel < last; ++panel) {
    const std::int64_t row = panel * kLanes, rows = smaller(kLanes, outputs - row);
    auto* to = reinterpret_cast<std::uint32_t*>(panels.data + panel * panels.panel_bytes);
    for (std::int64_t input = 0; input < inputs; input += kSpan, to += kLanes * kLanes) {
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t part = 0; part < kUnit<Dot>; ++part) {
          const std::int64_t at = input + part * kLanes;
          const std::int64_t n = larger(0, smaller(kLanes, inputs - at));
          const F32x16 x =
              n == 0 ? zero()
                     : load_element(matrix.element, matrix.data, (row + r) * matrix.stride + at, n);
          if constexpr (kUnit<Dot> == 1) {
            store(reinterpret_cast<float*>(units + r * kLanes), x);
          } else {
            store_bf16(reinterpret_cast<std::uint16_t*>(units + r * kLanes) + part * kLanes, x);
          }
        }
      }
      transpose_units(units, kLanes, rows, smaller(kLanes, ceil_div(inputs - input, kUnit<Dot>)),
                      to);
    }
  }
}

// Columns [first, last) of `inputs` rows as rows of units, [last - first][stride], and their
// `sums` where these are asked for. `stride` is a multiple of 16.
template <class Dot>
void stage_columns(const Matrix& matrix, std::int64_t inputs, std::int64_t first, std::int64_t last,
                   std::int64_t stride, std::uint32_t* to, float* sums) {
  alignas(64) std::uint32_t units[kLanes * kLanes], turned[kLanes * kLanes];
  const std::int64_t steps = ceil_div(inputs, kUnit<Dot>);
  for (std::int64_t step = 0; step < steps; step += kLanes) {
    const std::int64_t end = smaller(step + kLanes, steps);
    // Rows of the next steps: a few lines each, too far apart for the hardware to foresee.
    const std::int64_t bytes = matrix.element == Element::kFloat32 ? 4 : 2;
    const std::int64_t until = smaller((end + kLanes) * kUnit<Dot>, inputs);
    for (std::int64_t row = end * kUnit<Dot>; row < until; ++row) {
      const auto* line = static_cast<const std::byte*>(matrix.data) + row * matrix.stride * bytes;
      for (std::int64_t at = first * bytes; at < last * bytes; at += 64) {
        __builtin_prefetch(line + at);
      }
    }
    for (std::int64_t column = first; column < last; column += kLanes) {
      const std::int64_t columns = smaller(kLanes, last - column);
      columns_to_units<Dot>(matrix, inputs, column, columns, step, end, units);
      transpose_units(units, kLanes, end - step, columns, turned);
      for (std::int64_t c = 0; c < columns; ++c) {
        store_int32(reinterpret_cast<std::int32_t*>(to) + (column - first + c) * stride + step,
                    load_int32(reinterpret_cast<const std::int32_t*>(turned) + c * kLanes));
      }
      if (sums == nullptr) continue;
      // Sums of sums lose fewer digits than one long sum.
      F32x16 sum = zero();
      for (std::int64_t row = step * kUnit<Dot>; row < smaller(end * kUnit<Dot>, inputs); ++row) {
        sum = add(sum,
                  load_element(matrix.element, matrix.data, row * matrix.stride + column, columns));
      }
      if (step > 0) sum = add(load(sums + column - first), sum);
      store(sums + column - first, sum);
    }
  }
}

inline Panels panels_of(const Operand& operand, std::int64_t steps) {
  return {operand.data, operand.panel_bytes, steps, 1, 0, {}};
}

// sums[rows][stride] of rows of units with inputs [first, first + inputs) of an operand, set or
// added to. The last of an odd count of bfloat16 inputs shares its units with one that may be
// beyond a prefix, and is multiplied alone.
template <class Dot>
void add_product(const std::uint32_t* tokens, std::int64_t token_stride, std::int64_t rows,
                 const Operand& operand, std::int64_t first, std::int64_t inputs,
                 std::int64_t outputs, bool set, float* sums, std::int64_t stride) {
  const bool odd = inputs % kUnit<Dot> != 0;
  const std::int64_t steps = inputs / kUnit<Dot>;
  const Operand from{operand.data + first / kUnit<Dot> * kStepBytes, operand.panel_bytes};
  multiply<Dot>({tokens, token_stride}, rows, panels_of(from, steps), 0, ceil_div(outputs, kLanes),
                [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
                    std::int64_t width) {
                  for (std::int64_t r = 0; r < count; ++r) {
                    for (std::int64_t p = 0; p < width; ++p) {
                      float* to = sums + (row + r) * stride + (panel + p) * kLanes;
                      F32x16 product = load(tile.row(r, p));
                      if (odd) {
                        product = fma(set1(low_of(tokens[(row + r) * token_stride + steps])),
                                      low_of_step(from.data + (panel + p) * from.panel_bytes +
                                                  steps * kStepBytes),
                                      product);
                      }
                      store(to, set ? product : add(load(to), product));
                    }
                  }
                });
}

// The same over all inputs, kNeuronGroup at a time: the panels of a group stay in cache.
template <class Dot>
void product_of_rows(const std::uint32_t* tokens, std::int64_t token_stride, std::int64_t rows,
                     const Operand& operand, std::int64_t inputs, std::int64_t outputs, float* sums,
                     std::int64_t stride) {
  for (std::int64_t first = 0; first < inputs; first += kNeuronGroup) {
    add_product<Dot>(tokens + first / kUnit<Dot>, token_stride, rows, operand, first,
                     smaller(kNeuronGroup, inputs - first), outputs, first == 0, sums, stride);
  }
}

// Rows [first, last) of gradient = rows^T x other.
template <class Dot>
void weight_gradient(const WeightGradientArgs& args, std::int64_t first, std::int64_t last) {
  const std::int64_t rows = last - first, c16 = round_up(args.columns, kLanes);
  ScratchFrame frame;
  auto* sums = static_cast<float*>(frame.take(rows * c16 * sizeof(float)));
  auto* bias = static_cast<float*>(frame.take(2 * round_up(rows, kLanes) * sizeof(float)));
  const std::int64_t stride = kTokenChunk / kUnit<Dot>;
  auto* staged = static_cast<std::uint32_t*>(frame.take(rows * stride * sizeof(std::uint32_t)));
  float* part_bias = bias + round_up(rows, kLanes);
  for (std::int64_t r = 0; r < rows; r += kLanes) store(bias + r, zero());
  bool set = true;
  for (std::int64_t i = 0; i < args.num_chunks; ++i) {
    const TokenChunk& chunk = args.chunks[i];
    if (chunk.width <= first) continue;
    const std::int64_t tokens = chunk.last - chunk.first, size = 4 / kUnit<Dot>;
    const Matrix part{kElementOf<Dot>,
                      static_cast<const std::byte*>(args.rows) + chunk.first * args.stride * size,
                      args.stride};
    stage_columns<Dot>(part, tokens, first, last, stride, staged,
                       args.bias_gradient == nullptr ? nullptr : part_bias);
    if (args.bias_gradient != nullptr) {
      for (std::int64_t r = 0; r < rows; r += kLanes) {
        store(bias + r, add(load(bias + r), load(part_bias + r)));
      }
    }
    const std::int64_t steps = ceil_div(tokens, kUnit<Dot>);
    const Operand other{const_cast<std::byte*>(chunk.panels), steps * kStepBytes};
    multiply<Dot>({staged, stride}, rows, panels_of(other, steps), 0, c16 / kLanes,
                  [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
                      std::int64_t width) {
                    for (std::int64_t r = 0; r < count; ++r) {
                      for (std::int64_t p = 0; p < width; ++p) {
                        float* to = sums + (row + r) * c16 + (panel + p) * kLanes;
                        const F32x16 product = load(tile.row(r, p));
                        store(to, set ? product : add(load(to), product));
                      }
                    }
                  });
    set = false;
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < args.columns; c += kLanes) {
      store_element(args.element, args.gradient, (first + r) * args.columns + c,
                    load(sums + r * c16 + c), smaller(kLanes, args.columns - c));
    }
  }
  if (args.bias_gradient == nullptr) return;
  for (std::int64_t r = 0; r < rows; r += kLanes) {
    store_element(args.bias_element, args.bias_gradient, first + r, load(bias + r),
                  smaller(kLanes, rows - r));
  }
}
