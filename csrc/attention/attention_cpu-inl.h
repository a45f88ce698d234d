// The attention sublayer, compiled once per instruction set.
//
// Queries, keys and values of all heads in use are projected first, [H][3][T][D]; queries already
// carry the softmax scale and log2(e), so that the softmax is one of powers of two. Then a block of
// rows attends head by head and goes through the output projection and the norm on its own.

// Keys met before the running softmax is brought up to date: the score rows of a tile stay in L1,
// and sequences up to this length need no correction at all.
constexpr std::int64_t kKeyBlock = 512;
// Queries that share one pass over the packed keys.
constexpr std::int64_t kQueryRows = 4 * kTileRows;

template <class Dot>
constexpr Compute kCoreOf =
    std::is_same_v<Dot, DotBFloat16> ? Compute::kBFloat16 : Compute::kFloat32;
template <class Dot>
using CoreDot = std::conditional_t<std::is_same_v<Dot, DotBFloat16>, DotBFloat16, DotFloat32>;
template <class Dot>
using CoreElement = std::conditional_t<std::is_same_v<Dot, DotBFloat16>, std::uint16_t, float>;

inline void store_core(std::uint16_t* p, F32x16 x, std::int64_t n) { store_bf16(p, x, n); }
inline void store_core(float* p, F32x16 x, std::int64_t n) { store(p, x, n); }

template <class Dot>
void attention_qkv(const AttentionArgs& args, std::int64_t first, std::int64_t last,
                   std::int64_t first_panel, std::int64_t last_panel) {
  const AttentionPanels& panels = *args.panels;
  const std::int64_t dim = panels.head_dim, part_panels = ceil_div(dim, kLanes);
  const std::int64_t head_panels = 3 * part_panels, panel_bytes = panels.qkv_steps * kStepBytes;
  const float query_scale = 1.4426950409f / __builtin_sqrtf(static_cast<float>(dim));
  ScratchFrame frame;
  const Tokens tokens =
      stage_tokens(panels.compute, args.rows.element, args.rows.hidden, panels.hidden_size, first,
                   last, frame, spread_of(panels.hidden_size));
  auto* qkv = static_cast<CoreElement<Dot>*>(args.qkv);
  for (std::int64_t begin = first_panel; begin < last_panel;) {
    const std::int64_t head = begin / head_panels;
    const std::int64_t end = smaller(last_panel, (head + 1) * head_panels);
    const std::byte* of_head = panels.data + head * panels.head_bytes;
    const Panels weights{of_head, panel_bytes, panels.qkv_steps,
                         1,       0,           {of_head + panels.head_bytes, panel_bytes}};
    const std::int64_t lanes = head * head_panels * kLanes;
    multiply<Dot>(
        tokens, last - first, weights, begin - head * head_panels, end - head * head_panels,
        [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
            std::int64_t width) {
          for (std::int64_t p = 0; p < width; ++p) {
            const std::int64_t part = (panel + p) / part_panels;
            const std::int64_t d = (panel + p) % part_panels * kLanes;
            const std::int64_t at = lanes + (panel + p) * kLanes;
            const F32x16 factor = set1(part == 0 ? query_scale : 1.0f);
            const F32x16 bias = mul(load(panels.qkv_bias + at), factor);
            const F32x16 scale =
                panels.qkv_scale == nullptr ? factor : mul(load(panels.qkv_scale + at), factor);
            CoreElement<Dot>* to =
                qkv + ((head * 3 + part) * args.num_tokens + first + row) * dim + d;
            for (std::int64_t r = 0; r < count; ++r) {
              const F32x16 product = load(tile.row(r, p));
              store_core(to + r * dim, fma(product, scale, bias), smaller(kLanes, dim - d));
            }
          }
        });
    begin = end;
  }
}

// Keys as panels of 16 keys, and values as panels of 16 dimensions, zeros past the ends.
inline void pack_keys(const float* keys, std::int64_t count, std::int64_t dim, std::byte* panels) {
  auto* to = reinterpret_cast<std::uint32_t*>(panels);
  for (std::int64_t key = 0; key < count; key += kLanes, to += dim * kLanes) {
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      transpose_units(reinterpret_cast<const std::uint32_t*>(keys + key * dim + d), dim,
                      smaller(kLanes, count - key), smaller(kLanes, dim - d), to + d * kLanes);
    }
  }
}
inline void pack_keys(const std::uint16_t* keys, std::int64_t count, std::int64_t dim,
                      std::byte* panels) {
  pack_keys(reinterpret_cast<const float*>(keys), count, dim / 2, panels);
}
inline void pack_values(const float* values, std::int64_t count, std::int64_t dim,
                        std::byte* panels) {
  for (std::int64_t d = 0; d < dim; d += kLanes) {
    for (std::int64_t key = 0; key < count; ++key, panels += kStepBytes) {
      store(reinterpret_cast<float*>(panels),
            load(values + key * dim + d, smaller(kLanes, dim - d)));
    }
  }
}
inline void pack_values(const std::uint16_t* values, std::int64_t count, std::int64_t dim,
                        std::byte* panels) {
  for (std::int64_t d = 0; d < dim; d += kLanes) {
    for (std::int64_t key = 0; key < count; key += 2, panels += kStepBytes) {
      const std::uint16_t* at = values + key * dim + d;
      interleave(at, key + 1 < count ? at + dim : nullptr, smaller(kLanes, dim - d),
                 reinterpret_cast<std::uint32_t*>(panels));
    }
  }
}

// Keys and values of one block of a sequence, ready for products.
struct KeyBlock {
  Panels keys, values;
  std::int64_t count;
};

template <class Element>
KeyBlock pack_block(const Element* keys, const Element* values, std::int64_t count,
                    std::int64_t dim, std::byte* room) {
  const std::int64_t unit = 4 / sizeof(Element);
  const std::int64_t key_steps = dim / unit, value_steps = ceil_div(count, unit);
  std::byte* value_room = room + ceil_div(count, kLanes) * key_steps * kStepBytes;
  pack_keys(keys, count, dim, room);
  pack_values(values, count, dim, value_room);
  return {{room, key_steps * kStepBytes, key_steps, 1, 0, {}},
          {value_room, value_steps * kStepBytes, value_steps, 1, 0, {}},
          count};
}

template <class Element>
std::int64_t block_bytes(std::int64_t count, std::int64_t dim) {
  const std::int64_t unit = 4 / sizeof(Element);
  return kStepBytes *
         (ceil_div(count, kLanes) * (dim / unit) + ceil_div(dim, kLanes) * ceil_div(count, unit));
}

// Softmax state of kQueryRows queries.
struct Running {
  float top[kQueryRows];    // largest score so far
  float total[kQueryRows];  // sum of 2^(score - top)
};

// One block of keys for up to kQueryRows queries.
//   queries  [rows][D], scores [kQueryRows][kKeyBlock] and chances the same, scratch
//   sums     [kQueryRows][D16], not yet divided by the total
template <class Dot, class Element>
void attend_block(const Element* queries, std::int64_t rows, std::int64_t dim,
                  const KeyBlock& block, bool is_first, float* scores, Element* chances,
                  Running& running, float* sums) {
  constexpr std::int64_t kUnit = 4 / sizeof(Element);
  const std::int64_t d16 = round_up(dim, kLanes);
  multiply<Dot>({reinterpret_cast<const std::uint32_t*>(queries), dim / kUnit}, rows, block.keys, 0,
                ceil_div(block.count, kLanes),
                [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
                    std::int64_t width) {
                  for (std::int64_t r = 0; r < count; ++r) {
                    for (std::int64_t p = 0; p < width; ++p) {
                      store(scores + (row + r) * kKeyBlock + (panel + p) * kLanes,
                            load(tile.row(r, p)));
                    }
                  }
                });
  float shrink[kQueryRows];
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* score = scores + row * kKeyBlock;
    F32x16 highest = set1(is_first ? -__builtin_inff() : running.top[row]);
    for (std::int64_t key = 0; key < block.count; key += kLanes) {
      const std::int64_t live = block.count - key;
      const F32x16 x = load(score + key);
      highest = max(highest, live < kLanes ? select_first(live, x, highest) : x);
    }
    const float top = max_of(highest);
    shrink[row] = is_first ? 0.0f : __builtin_exp2f(running.top[row] - top);
    F32x16 total = zero();
    for (std::int64_t key = 0; key < block.count; key += kLanes) {
      const std::int64_t live = block.count - key;
      F32x16 power = exp2_of(sub(load(score + key), set1(top)));
      if (live < kLanes) power = select_first(live, power, zero());
      store_core(chances + row * kKeyBlock + key, power, kLanes);
      total = add(total, power);
    }
    running.total[row] = (is_first ? 0.0f : running.total[row] * shrink[row]) + sum_of(total);
    running.top[row] = top;
  }
  multiply<Dot>({reinterpret_cast<const std::uint32_t*>(chances), kKeyBlock / kUnit}, rows,
                block.values, 0, d16 / kLanes,
                [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
                    std::int64_t width) {
                  for (std::int64_t r = 0; r < count; ++r) {
                    const F32x16 keep = set1(shrink[row + r]);
                    for (std::int64_t p = 0; p < width; ++p) {
                      float* to = sums + (row + r) * d16 + (panel + p) * kLanes;
                      const F32x16 product = load(tile.row(r, p));
                      store(to, is_first ? product : fma(load(to), keep, product));
                    }
                  }
                });
}

// Rows [first, last) of one head, all of one sequence: context[row][head * D + d].
//   context  row `first` of the batch, `stride` elements a row
template <class Dot>
void attend(const AttentionArgs& args, std::int64_t head, std::int64_t sequence, std::int64_t first,
            std::int64_t last, CoreElement<Dot>* context, std::int64_t stride) {
  using Element = CoreElement<Dot>;
  using Core = CoreDot<Dot>;
  const std::int64_t dim = args.panels->head_dim, d16 = round_up(dim, kLanes);
  const std::int64_t begin = args.cu_seqlens[sequence], end = args.cu_seqlens[sequence + 1];
  const auto* queries = static_cast<const Element*>(args.qkv) + head * 3 * args.num_tokens * dim;
  const Element* keys = queries + args.num_tokens * dim;
  const Element* values = keys + args.num_tokens * dim;
  const std::int64_t rows = last - first, longest = smaller(kKeyBlock, end - begin);
  ScratchFrame frame;
  auto* room = static_cast<std::byte*>(frame.take(block_bytes<Element>(longest, dim)));
  auto* scores = static_cast<float*>(frame.take(kQueryRows * kKeyBlock * sizeof(float)));
  auto* chances = static_cast<Element*>(frame.take(kQueryRows * kKeyBlock * sizeof(Element)));
  const std::int64_t tiles = ceil_div(rows, kQueryRows);
  auto* running = static_cast<Running*>(frame.take(tiles * sizeof(Running)));
  auto* sums = static_cast<float*>(frame.take(tiles * kQueryRows * d16 * sizeof(float)));
  for (std::int64_t key = begin; key < end; key += kKeyBlock) {
    const KeyBlock block =
        pack_block(keys + key * dim, values + key * dim, smaller(kKeyBlock, end - key), dim, room);
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const std::int64_t at = tile * kQueryRows;
      attend_block<Core>(queries + (first + at) * dim, smaller(kQueryRows, rows - at), dim, block,
                         key == begin, scores, chances, running[tile], sums + at * d16);
    }
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    const F32x16 share = set1(1.0f / running[row / kQueryRows].total[row % kQueryRows]);
    Element* to = context + row * stride + head * dim;
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      store_core(to + d, mul(load(sums + row * d16 + d), share), smaller(kLanes, dim - d));
    }
  }
}

inline std::int64_t sequence_of(const AttentionArgs& args, std::int64_t token) {
  std::int64_t low = 0, high = args.batch_size;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (args.cu_seqlens[middle] <= token ? low : high) = middle;
  }
  return low;
}

// The context of rows [first, last) and heads [first_head, last_head).
template <class Dot>
void attention_context(const AttentionArgs& args, std::int64_t first, std::int64_t last,
                       std::int64_t first_head, std::int64_t last_head, CoreElement<Dot>* context,
                       std::int64_t stride) {
  for (std::int64_t at = first, sequence = sequence_of(args, first); at < last; ++sequence) {
    const std::int64_t end = smaller(last, args.cu_seqlens[sequence + 1]);
    if (end <= at) continue;
    for (std::int64_t head = first_head; head < last_head; ++head) {
      attend<Dot>(args, head, sequence, at, end, context + (at - first) * stride, stride);
    }
    at = end;
  }
}

// Output panels [first_panel, last_panel) for rows of context, to sums[rows][C16].
template <class Dot>
void attention_out(const AttentionArgs& args, const Tokens& context, std::int64_t rows,
                   std::int64_t first_panel, std::int64_t last_panel, float* sums) {
  const AttentionPanels& panels = *args.panels;
  const std::int64_t c16 = round_up(panels.hidden_size, kLanes);
  const std::int64_t steps = panels.head_dim / per_unit(panels.compute);
  const std::int64_t qkv_panels = 3 * ceil_div(panels.head_dim, kLanes);
  const Panels weights{panels.data + qkv_panels * panels.qkv_steps * kStepBytes,
                       steps * kStepBytes,
                       steps,
                       args.heads,
                       panels.head_bytes,
                       args.next};
  multiply<Dot>(context, rows, weights, first_panel, last_panel,
                [&](const Tile& tile, std::int64_t row, std::int64_t count, std::int64_t panel,
                    std::int64_t width) {
                  for (std::int64_t r = 0; r < count; ++r) {
                    for (std::int64_t p = 0; p < width; ++p) {
                      store(sums + (row + r) * c16 + (panel + p) * kLanes, load(tile.row(r, p)));
                    }
                  }
                });
}

template <class Dot>
Tokens attention_context_tokens(const AttentionArgs& args, const void* context, std::int64_t rows,
                                ScratchFrame& frame) {
  const Element element =
      kCoreOf<Dot> == Compute::kBFloat16 ? Element::kBFloat16 : Element::kFloat32;
  return stage_tokens(args.panels->compute, element, context, args.heads * args.panels->head_dim, 0,
                      rows, frame);
}

template <class Dot>
void attention_rows(const AttentionArgs& args, std::int64_t first, std::int64_t last) {
  const AttentionPanels& panels = *args.panels;
  const std::int64_t rows = last - first, stride = args.heads * panels.head_dim;
  const std::int64_t c16 = round_up(panels.hidden_size, kLanes);
  ScratchFrame frame;
  auto* context =
      static_cast<CoreElement<Dot>*>(frame.take(rows * stride * sizeof(CoreElement<Dot>)));
  auto* sums = static_cast<float*>(frame.take(rows * c16 * sizeof(float)));
  attention_context<Dot>(args, first, last, 0, args.heads, context, stride);
  const Tokens tokens = attention_context_tokens<Dot>(args, context, rows, frame);
  attention_out<Dot>(args, tokens, rows, 0, c16 / kLanes, sums);
  norm_rows(panels.norm, args.rows, first, last, panels.hidden_size, sums);
}

template <class Dot>
void attention_context_shared(const AttentionArgs& args, std::int64_t first_head,
                              std::int64_t last_head, void* context) {
  attention_context<Dot>(args, 0, args.num_tokens, first_head, last_head,
                         static_cast<CoreElement<Dot>*>(context),
                         args.heads * args.panels->head_dim);
}

template <class Dot>
void attention_out_shared(const AttentionArgs& args, std::int64_t first_panel,
                          std::int64_t last_panel, const void* context, float* sums) {
  ScratchFrame frame;
  const Tokens tokens = attention_context_tokens<Dot>(args, context, args.num_tokens, frame);
  attention_out<Dot>(args, tokens, args.num_tokens, first_panel, last_panel, sums);
}

inline void attention_norm(const AttentionArgs& args, std::int64_t first, std::int64_t last,
                           float* sums) {
  const std::int64_t c16 = round_up(args.panels->hidden_size, kLanes);
  norm_rows(args.panels->norm, args.rows, first, last, args.panels->hidden_size,
            sums + first * c16);
}
