// The softmax core of attention in training, compiled once per instruction set: one head of one
// sequence at a time.
//
// Kept for the gradient are queries, keys, values, context, and the logarithm of each row's softmax
// sum; probabilities are computed again from it, a tile of queries by a block of keys.

// Queries of a tile in the gradient: what is summed over in registers for those of keys and values.
constexpr std::int64_t kGradientRows = 64;

// Rows of one head of one sequence within [T][H][parts][D].
template <class Dot>
Matrix head_matrix(const CoreArgs& args, const void* base, std::int64_t parts,
                   std::int64_t sequence, std::int64_t head, std::int64_t part) {
  const std::int64_t stride = args.num_heads * parts * args.head_dim;
  const std::int64_t at =
      args.cu_seqlens[sequence] * stride + (head * parts + part) * args.head_dim;
  return {kElementOf<Dot>, static_cast<const std::byte*>(base) + at * (4 / kUnit<Dot>), stride};
}
template <class Dot>
Matrix rows_from(const Matrix& matrix, std::int64_t row) {
  const std::int64_t bytes = row * matrix.stride * (4 / kUnit<Dot>);
  return {matrix.element, static_cast<const std::byte*>(matrix.data) + bytes, matrix.stride};
}
template <class Dot>
const std::uint32_t* units_of(const Matrix& matrix) {
  return static_cast<const std::uint32_t*>(matrix.data);
}

// Rows as outputs of a product, or as its inputs, of dimension D.
template <class Dot>
Operand rows_as_outputs(const Matrix& matrix, std::int64_t rows, std::int64_t dim,
                        ScratchFrame& frame) {
  const std::int64_t panels = ceil_div(rows, kLanes),
                     bytes = ceil_div(dim, kUnit<Dot>) * kStepBytes;
  const Operand operand{static_cast<std::byte*>(frame.take(panels * bytes)), bytes};
  pack_outputs<Dot>(matrix, rows, dim, 0, panels, operand);
  return operand;
}
template <class Dot>
Operand rows_as_inputs(const Matrix& matrix, std::int64_t rows, std::int64_t dim,
                       ScratchFrame& frame) {
  const std::int64_t steps = ceil_div(rows, kUnit<Dot>), bytes = steps * kStepBytes;
  const Operand operand{static_cast<std::byte*>(frame.take(ceil_div(dim, kLanes) * bytes)), bytes};
  pack_inputs<Dot>(matrix, rows, dim, 0, steps, operand);
  return operand;
}

inline float softmax_scale(std::int64_t dim) {
  return 1.4426950409f / __builtin_sqrtf(static_cast<float>(dim));
}

template <class Dot>
void core_forward(const CoreArgs& args, std::int64_t sequence, std::int64_t head) {
  const std::int64_t begin = args.cu_seqlens[sequence], dim = args.head_dim;
  const std::int64_t length = args.cu_seqlens[sequence + 1] - begin;
  const std::int64_t d16 = round_up(dim, kLanes), keys16 = keep_size(length);
  const Matrix queries = head_matrix<Dot>(args, args.qkv, 3, sequence, head, 0);
  const Matrix context = head_matrix<Dot>(args, args.context, 1, sequence, head, 0);
  ScratchFrame frame;
  const Operand keys = rows_as_outputs<Dot>(head_matrix<Dot>(args, args.qkv, 3, sequence, head, 1),
                                            length, dim, frame);
  const Operand values = rows_as_inputs<Dot>(head_matrix<Dot>(args, args.qkv, 3, sequence, head, 2),
                                             length, dim, frame);
  const std::int64_t tile_rows = smaller(kQueryRows, length);
  auto* scores = static_cast<float*>(frame.take(tile_rows * keys16 * sizeof(float)));
  void* chances = frame.take(tile_rows * keys16 * sizeof(float));
  auto* keep = static_cast<float*>(frame.take(keys16 * sizeof(float)));
  auto* sums = static_cast<float*>(frame.take(tile_rows * d16 * sizeof(float)));
  const F32x16 scale = set1(softmax_scale(dim));
  for (std::int64_t at = 0; at < length; at += kQueryRows) {
    const std::int64_t rows = smaller(kQueryRows, length - at);
    const Matrix tile = rows_from<Dot>(queries, at);
    add_product<Dot>(units_of<Dot>(tile), tile.stride / kUnit<Dot>, rows, keys, 0, dim, length,
                     true, scores, keys16);
    float share[kQueryRows];
    for (std::int64_t row = 0; row < rows; ++row) {
      float* score = scores + row * keys16;
      F32x16 highest = set1(-__builtin_inff());
      for (std::int64_t key = 0; key < length; key += kLanes) {
        const F32x16 x = mul(load(score + key), scale);
        store(score + key, x);
        highest = max(highest, length - key < kLanes ? select_first(length - key, x, highest) : x);
      }
      const float top = max_of(highest);
      if (args.dropout.is_on) keep_attention(args.dropout, head, begin + at + row, 0, length, keep);
      F32x16 total = zero();
      for (std::int64_t key = 0; key < length; key += kLanes) {
        F32x16 power = exp2_of(sub(load(score + key), set1(top)));
        if (length - key < kLanes) power = select_first(length - key, power, zero());
        total = add(total, power);
        if (args.dropout.is_on) power = mul(power, load(keep + key));
        store_element(kElementOf<Dot>, chances, row * keys16 + key, power, kLanes);
      }
      const float sum = sum_of(total);
      share[row] = 1.0f / sum;
      args.log_sum[head * args.num_tokens + begin + at + row] = top + __builtin_log2f(sum);
    }
    product_of_rows<Dot>(static_cast<const std::uint32_t*>(chances), keys16 / kUnit<Dot>, rows,
                         values, round_up(length, kUnit<Dot>), d16, sums, d16);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t d = 0; d < dim; d += kLanes) {
        store_element(kElementOf<Dot>, const_cast<void*>(context.data),
                      (at + row) * context.stride + d,
                      mul(load(sums + row * d16 + d), set1(share[row])), smaller(kLanes, dim - d));
      }
    }
  }
}

// to[rows][D] of a head's gradient = sums * factor.
template <class Dot>
void store_rows(const Matrix& to, std::int64_t rows, std::int64_t dim, const float* sums,
                float factor) {
  const std::int64_t d16 = round_up(dim, kLanes);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      store_element(kElementOf<Dot>, const_cast<void*>(to.data), row * to.stride + d,
                    mul(load(sums + row * d16 + d), set1(factor)), smaller(kLanes, dim - d));
    }
  }
}

// sums[keys][D16] += columns^T x rows, where columns are [rows][stride] elements.
template <class Dot>
void add_transposed(const void* columns, std::int64_t stride, std::int64_t rows, std::int64_t keys,
                    const Operand& other, std::int64_t dim, bool set, std::uint32_t* staged,
                    float* sums) {
  constexpr std::int64_t kStride = round_up(ceil_div(kGradientRows, kUnit<Dot>), kLanes);
  stage_columns<Dot>({kElementOf<Dot>, columns, stride}, rows, 0, keys, kStride, staged, nullptr);
  const std::int64_t d16 = round_up(dim, kLanes);
  add_product<Dot>(staged, kStride, keys, other, 0, round_up(rows, kUnit<Dot>), d16, set, sums,
                   d16);
}

template <class Dot>
void core_backward(const CoreArgs& args, std::int64_t sequence, std::int64_t head) {
  constexpr Element kElement = kElementOf<Dot>;
  const std::int64_t begin = args.cu_seqlens[sequence], dim = args.head_dim;
  const std::int64_t length = args.cu_seqlens[sequence + 1] - begin, d16 = round_up(dim, kLanes);
  const Matrix queries = head_matrix<Dot>(args, args.qkv, 3, sequence, head, 0);
  const Matrix keys = head_matrix<Dot>(args, args.qkv, 3, sequence, head, 1);
  const Matrix values = head_matrix<Dot>(args, args.qkv, 3, sequence, head, 2);
  const Matrix context = head_matrix<Dot>(args, args.context, 1, sequence, head, 0);
  const Matrix upstream = head_matrix<Dot>(args, args.context_gradient, 1, sequence, head, 0);
  const auto gradient_of = [&](std::int64_t part) {
    return head_matrix<Dot>(args, args.qkv_gradient, 3, sequence, head, part);
  };
  const std::int64_t block_keys = smaller(kKeyBlock, length), stride = keep_size(block_keys);
  const std::int64_t tile_rows = smaller(kGradientRows, length);
  ScratchFrame frame;
  const auto floats = [&](std::int64_t count) {
    return static_cast<float*>(frame.take(count * sizeof(float)));
  };
  float *chances = floats(tile_rows * stride), *slopes = floats(tile_rows * stride);
  float *dropped = floats(tile_rows * stride), *score_gradient = floats(tile_rows * stride);
  float *keep = floats(stride), *inner = floats(length);
  float *query_sums = floats(length * d16), *key_sums = floats(block_keys * d16);
  float* value_sums = floats(block_keys * d16);
  auto* staged = static_cast<std::uint32_t*>(frame.take(block_keys * kGradientRows * 4));
  for (std::int64_t row = 0; row < length; ++row) {
    F32x16 sum = zero();
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      const std::int64_t n = smaller(kLanes, dim - d);
      sum = fma(load_element(kElement, context.data, row * context.stride + d, n),
                load_element(kElement, upstream.data, row * upstream.stride + d, n), sum);
    }
    inner[row] = sum_of(sum);
  }
  const F32x16 scale = set1(softmax_scale(dim));
  const float plain_scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  for (std::int64_t key = 0; key < length; key += kKeyBlock) {
    const std::int64_t count = smaller(kKeyBlock, length - key);
    ScratchFrame block_frame;
    const Operand key_outputs =
        rows_as_outputs<Dot>(rows_from<Dot>(keys, key), count, dim, block_frame);
    const Operand key_inputs =
        rows_as_inputs<Dot>(rows_from<Dot>(keys, key), count, dim, block_frame);
    const Operand value_outputs =
        rows_as_outputs<Dot>(rows_from<Dot>(values, key), count, dim, block_frame);
    for (std::int64_t at = 0; at < length; at += kGradientRows) {
      const std::int64_t rows = smaller(kGradientRows, length - at);
      const Matrix tile = rows_from<Dot>(queries, at), above = rows_from<Dot>(upstream, at);
      ScratchFrame tile_frame;
      const Operand query_inputs = rows_as_inputs<Dot>(tile, rows, dim, tile_frame);
      const Operand upstream_inputs = rows_as_inputs<Dot>(above, rows, dim, tile_frame);
      add_product<Dot>(units_of<Dot>(tile), tile.stride / kUnit<Dot>, rows, key_outputs, 0, dim,
                       count, true, chances, stride);
      add_product<Dot>(units_of<Dot>(above), above.stride / kUnit<Dot>, rows, value_outputs, 0, dim,
                       count, true, slopes, stride);
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t token = begin + at + row;
        const F32x16 log_sum = set1(args.log_sum[head * args.num_tokens + token]);
        const F32x16 mean = set1(inner[at + row]);
        if (args.dropout.is_on) keep_attention(args.dropout, head, token, key, count, keep);
        for (std::int64_t k = 0; k < count; k += kLanes) {
          const std::int64_t from = row * stride + k;
          F32x16 chance = exp2_of(sub(mul(load(chances + from), scale), log_sum));
          if (count - k < kLanes) chance = select_first(count - k, chance, zero());
          const F32x16 factor = args.dropout.is_on ? load(keep + k) : set1(1.0f);
          F32x16 gradient = mul(chance, sub(mul(load(slopes + from), factor), mean));
          if (count - k < kLanes) gradient = select_first(count - k, gradient, zero());
          store_element(kElement, score_gradient, from, gradient, kLanes);
          store_element(kElement, dropped, from, mul(chance, factor), kLanes);
        }
      }
      add_product<Dot>(reinterpret_cast<const std::uint32_t*>(score_gradient), stride / kUnit<Dot>,
                       rows, key_inputs, 0, round_up(count, kUnit<Dot>), d16, key == 0,
                       query_sums + at * d16, d16);
      add_transposed<Dot>(score_gradient, stride, rows, count, query_inputs, dim, at == 0, staged,
                          key_sums);
      add_transposed<Dot>(dropped, stride, rows, count, upstream_inputs, dim, at == 0, staged,
                          value_sums);
    }
    store_rows<Dot>(rows_from<Dot>(gradient_of(1), key), count, dim, key_sums, plain_scale);
    store_rows<Dot>(rows_from<Dot>(gradient_of(2), key), count, dim, value_sums, 1.0f);
  }
  store_rows<Dot>(gradient_of(0), length, dim, query_sums, plain_scale);
}
