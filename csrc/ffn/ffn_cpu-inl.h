// The feed-forward sublayer, compiled once per instruction set.
//
// A block of tokens goes through the neurons group by group: up panels, activation, down panels
// added to the block's sums. The intermediate is [rows][kNeuronGroup] and stays in cache.

struct FfnGroup {
  Panels up, down;
  std::int64_t neurons;  // of the group, in the prefix
  bool is_odd;           // the last of them shares its units with a neuron past the prefix
};

inline FfnGroup ffn_group(const FfnArgs& args, std::int64_t group) {
  const FfnPanels& panels = *args.panels;
  const std::int64_t count = smaller(kNeuronGroup, args.neurons - group * kNeuronGroup);
  const std::int64_t unit = per_unit(panels.compute);
  const std::byte* up = panels.data + group * panels.group_bytes;
  const std::int64_t up_bytes = panels.up_steps * kStepBytes;
  const std::byte* down = up + kNeuronGroup / kLanes * up_bytes;
  const std::int64_t down_bytes = kNeuronGroup / unit * kStepBytes;
  const bool is_last = (group + 1) * kNeuronGroup >= args.neurons;
  // int8 multiplies what lies past the prefix by zero; bfloat16 would make NaN of NaN.
  const bool is_odd = panels.compute == Compute::kBFloat16 && count % 2 != 0;
  return {{up, up_bytes, panels.up_steps, 1, 0, {down, down_bytes}},
          {down, down_bytes, is_odd ? count / 2 : ceil_div(count, unit), 1, 0,
           is_last ? args.next : Upcoming{up + panels.group_bytes, up_bytes}},
          count,
          is_odd};
}

// Up panels [first, last) of a group with bias and activation. Neurons past the prefix give zero.
//   inner  [rows][kNeuronGroup] of bfloat16, or of float for the other precisions
template <class Dot>
void ffn_up(const FfnPanels& panels, const FfnGroup& part, std::int64_t group, const Tokens& tokens,
            std::int64_t rows, std::int64_t first, std::int64_t last, void* inner) {
  const std::int64_t base = group * kNeuronGroup;
  with_activation(panels.activation, [&](auto activate) {
    multiply<Dot>(tokens, rows, part.up, first, last,
                  [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
                      std::int64_t width) {
                    for (std::int64_t p = 0; p < width; ++p) {
                      const std::int64_t at = (panel + p) * kLanes;
                      const F32x16 bias = load(panels.up_bias + base + at);
                      const F32x16 scale = panels.up_scale == nullptr
                                               ? set1(1.0f)
                                               : load(panels.up_scale + base + at);
                      const std::int64_t live = part.neurons - at;
                      for (std::int64_t r = 0; r < count; ++r) {
                        const F32x16 product = load(tile.row(r, p));
                        F32x16 y = activate(fma(product, scale, bias));
                        if (live < kLanes) y = select_first(live, y, zero());
                        const std::int64_t to = (row + r) * kNeuronGroup + at;
                        if constexpr (std::is_same_v<Dot, DotBFloat16>) {
                          store_bf16(static_cast<std::uint16_t*>(inner) + to, y);
                        } else {
                          store(static_cast<float*>(inner) + to, y);
                        }
                      }
                    }
                  });
  });
}

// The activations of a group as tokens of the down product.
template <class Dot>
Tokens ffn_inner_tokens(const void* inner, const FfnGroup& part, std::int64_t rows,
                        ScratchFrame& frame) {
  if constexpr (std::is_same_v<Dot, DotInt8>) {
    const std::int64_t stride = kNeuronGroup / 4;
    auto* units = static_cast<std::uint32_t*>(frame.take(rows * kNeuronGroup));
    auto* scales = static_cast<float*>(frame.take(rows * sizeof(float)));
    auto* offsets = static_cast<std::int32_t*>(frame.take(rows * sizeof(std::int32_t)));
    for (std::int64_t row = 0; row < rows; ++row) {
      const float* x = static_cast<const float*>(inner) + row * kNeuronGroup;
      scales[row] =
          quantize_row(x, largest_of(x, part.neurons), part.neurons, round_up(part.neurons, kLanes),
                       reinterpret_cast<std::int8_t*>(units + row * stride), offsets + row);
    }
    return {units, stride, scales, offsets};
  } else {
    const std::int64_t unit = std::is_same_v<Dot, DotBFloat16> ? 2 : 1;
    return {static_cast<const std::uint32_t*>(inner), kNeuronGroup / unit, nullptr, nullptr};
  }
}

// Down panels [first, last) of a group, added to sums[rows][C16]; the first group sets them.
template <class Dot>
void ffn_down(const FfnGroup& part, std::int64_t group, const Tokens& inner, std::int64_t rows,
              std::int64_t first, std::int64_t last, std::int64_t sums_stride, float* sums) {
  multiply<Dot>(inner, rows, part.down, first, last,
                [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
                    std::int64_t width) {
                  for (std::int64_t r = 0; r < count; ++r) {
                    for (std::int64_t p = 0; p < width; ++p) {
                      float* to = sums + (row + r) * sums_stride + (panel + p) * kLanes;
                      F32x16 product = load(tile.row(r, p));
                      if (part.is_odd) {
                        const std::int64_t step = part.down.steps;
                        product =
                            fma(set1(low_of(inner.units[(row + r) * inner.stride + step])),
                                low_of_step(part.down.data + (panel + p) * part.down.panel_bytes +
                                            step * kStepBytes),
                                product);
                      }
                      store(to, group == 0 ? product : add(load(to), product));
                    }
                  }
                });
}

template <class Dot>
void ffn_block(const FfnArgs& args, std::int64_t first, std::int64_t last) {
  const FfnPanels& panels = *args.panels;
  const std::int64_t rows = last - first, c16 = round_up(panels.hidden_size, kLanes);
  ScratchFrame frame;
  const Tokens tokens =
      stage_tokens(panels.compute, args.rows.element, args.rows.hidden, panels.hidden_size, first,
                   last, frame, spread_of(panels.hidden_size));
  auto* sums = static_cast<float*>(frame.take(rows * c16 * sizeof(float)));
  void* inner = frame.take(rows * kNeuronGroup * sizeof(float));
  for (std::int64_t group = 0; group * kNeuronGroup < args.neurons; ++group) {
    const FfnGroup part = ffn_group(args, group);
    ffn_up<Dot>(panels, part, group, tokens, rows, 0, ceil_div(part.neurons, kLanes), inner);
    ScratchFrame inner_frame;
    const Tokens active = ffn_inner_tokens<Dot>(inner, part, rows, inner_frame);
    ffn_down<Dot>(part, group, active, rows, 0, c16 / kLanes, c16, sums);
  }
  norm_rows(panels.norm, args.rows, first, last, panels.hidden_size, sums);
}

template <class Dot>
void ffn_up_shared(const FfnArgs& args, std::int64_t tokens_count, std::int64_t first_panel,
                   std::int64_t last_panel, void* inner) {
  const FfnPanels& panels = *args.panels;
  constexpr std::int64_t kGroupPanels = kNeuronGroup / kLanes;
  const std::int64_t element = std::is_same_v<Dot, DotBFloat16> ? 2 : 4;
  ScratchFrame frame;
  const Tokens tokens =
      stage_tokens(panels.compute, args.rows.element, args.rows.hidden, panels.hidden_size, 0,
                   tokens_count, frame, spread_of(panels.hidden_size));
  for (std::int64_t panel = first_panel; panel < last_panel;) {
    const std::int64_t group = panel / kGroupPanels;
    const std::int64_t end = smaller(last_panel, (group + 1) * kGroupPanels);
    auto* to = static_cast<std::byte*>(inner) + group * tokens_count * kNeuronGroup * element;
    ffn_up<Dot>(panels, ffn_group(args, group), group, tokens, tokens_count,
                panel - group * kGroupPanels, end - group * kGroupPanels, to);
    panel = end;
  }
}

template <class Dot>
void ffn_down_shared(const FfnArgs& args, std::int64_t tokens, std::int64_t first_panel,
                     std::int64_t last_panel, const void* inner, float* sums) {
  const FfnPanels& panels = *args.panels;
  const std::int64_t element = std::is_same_v<Dot, DotBFloat16> ? 2 : 4;
  for (std::int64_t group = 0; group * kNeuronGroup < args.neurons; ++group) {
    ScratchFrame frame;
    const FfnGroup part = ffn_group(args, group);
    const auto* from =
        static_cast<const std::byte*>(inner) + group * tokens * kNeuronGroup * element;
    const Tokens active = ffn_inner_tokens<Dot>(from, part, tokens, frame);
    ffn_down<Dot>(part, group, active, tokens, first_panel, last_panel,
                  round_up(panels.hidden_size, kLanes), sums);
  }
}

inline void ffn_norm(const FfnArgs& args, std::int64_t first, std::int64_t last, float* sums) {
  const std::int64_t c16 = round_up(args.panels->hidden_size, kLanes);
  norm_rows(args.panels->norm, args.rows, first, last, args.panels->hidden_size,
            sums + first * c16);
}
