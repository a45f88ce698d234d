#include <ATen/Parallel.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/work.h"
#include "encoder/embeddings.h"

namespace dynabert {
namespace {

constexpr const char* kWho = "embeddings";
// Four rows of 1.5 to 3 KiB cover the latency of DRAM and stay in L1.
constexpr std::int64_t kRowsAhead = 4;
// Fewer rows cost less than waking a thread.
constexpr std::int64_t kRowsPerThread = 32;

struct TokenRows {
  std::int64_t word, position, segment;
};

struct EmbeddingArgs {
  Element element;
  std::int64_t hidden_size;
  const TokenRows* rows;                  // [T]
  const void *word, *position, *segment;  // [any][C]
  const void *norm_weight, *norm_bias;    // [C]
  float eps;
  void* output;  // [T][C]
};

std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace dynabert

namespace dynabert::embedding_scalar {
namespace {
#include "cpu/vec_scalar.h"
#include "encoder/embeddings_cpu-inl.h"
}  // namespace
}  // namespace dynabert::embedding_scalar

#if defined(__x86_64__)
#define DYNABERT_TARGET "avx2,fma"
#include "cpu/target-begin-inl.h"
namespace dynabert::embedding_avx2 {
namespace {
#include "cpu/vec_avx2.h"
#include "encoder/embeddings_cpu-inl.h"
}  // namespace
}  // namespace dynabert::embedding_avx2
#include "cpu/target-end-inl.h"
#undef DYNABERT_TARGET

#define DYNABERT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#define DYNABERT_VNNI 0
#define DYNABERT_BF16 0
#include "cpu/target-begin-inl.h"
namespace dynabert::embedding_avx512 {
namespace {
#include "cpu/vec_avx512.h"
#include "encoder/embeddings_cpu-inl.h"
}  // namespace
}  // namespace dynabert::embedding_avx512
#include "cpu/target-end-inl.h"
#undef DYNABERT_TARGET
#endif

namespace dynabert {
namespace {

using EmbedRows = void (*)(const EmbeddingArgs&, std::int64_t, std::int64_t, float*);

EmbedRows active_rows() {
#if defined(__x86_64__)
  const char* isa = active_table().name;
  if (std::strncmp(isa, "avx512", 6) == 0) return embedding_avx512::embed_rows;
  if (std::strcmp(isa, "avx2") == 0) return embedding_avx2::embed_rows;
#endif
  return embedding_scalar::embed_rows;
}

// Ids of a padded batch, contiguous; rows of one are shared by all sequences.
class Ids {
 public:
  Ids(const char* name, const at::Tensor& ids, std::int64_t batch_size, std::int64_t seq_len,
      std::int64_t limit)
      : kept_(ids.contiguous()), wide_(ids.scalar_type() == at::kLong) {
    DYNABERT_CHECK_VALUE(
        ids.device().is_cpu() && (wide_ || ids.scalar_type() == at::kInt) && ids.dim() == 2 &&
            (ids.size(0) == batch_size || ids.size(0) == 1) && ids.size(1) == seq_len,
        kWho, name, ids.toString() + c10::str(ids.sizes()),
        c10::str("int32 or int64 on the CPU, [", batch_size, " or 1, ", seq_len, "]"),
        "Give one per token");
    repeats_ = ids.size(0) == batch_size ? 0 : seq_len;
    data_ = kept_.const_data_ptr();
    std::int64_t lowest = 0, highest = 0;
    for (std::int64_t i = 0; i < kept_.numel(); ++i) {
      lowest = std::min(lowest, value(i));
      highest = std::max(highest, value(i));
    }
    const std::int64_t extreme = lowest < 0 ? lowest : highest;
    TORCH_CHECK_VALUE(extreme >= 0 && extreme < limit, kWho, ": ", name, " holds ", extreme,
                      ", expected 0 to ", limit - 1,
                      ". The tokenizer may be that of another model.");
  }

  std::int64_t at(std::int64_t place) const {
    return value(repeats_ == 0 ? place : place % repeats_);
  }

 private:
  std::int64_t value(std::int64_t i) const {
    return wide_ ? static_cast<const std::int64_t*>(data_)[i]
                 : static_cast<const std::int32_t*>(data_)[i];
  }

  at::Tensor kept_;
  bool wide_;
  std::int64_t repeats_;
  const void* data_;
};

std::optional<Ids> some_ids(const char* name, const std::optional<at::Tensor>& ids,
                            const at::Tensor& input_ids, std::int64_t limit) {
  if (!ids.has_value()) return std::nullopt;
  return Ids(name, *ids, input_ids.size(0), input_ids.size(1), limit);
}

}  // namespace

at::Tensor embeddings_cpu(const at::Tensor& input_ids,
                          const std::optional<at::Tensor>& position_ids,
                          std::int64_t first_position,
                          const std::optional<at::Tensor>& token_type_ids,
                          const std::optional<at::Tensor>& indices, at::TensorList tables,
                          double norm_eps) {
  check_shape(kWho, "input_ids", input_ids, {-1, -1});
  DYNABERT_CHECK_VALUE(tables.size() == 5, kWho, "tables", tables.size(), 5,
                       "Give word, position and segment embeddings, norm weight and bias");
  std::vector<at::Tensor> whole;
  for (const at::Tensor& table : tables) whole.push_back(table.contiguous());
  check_shape(kWho, "word", whole[0], {-1, -1});
  const std::int64_t hidden_size = whole[0].size(1);
  for (const std::size_t i : {1, 2}) check_shape(kWho, "table", whole[i], {-1, hidden_size});
  for (const std::size_t i : {3, 4}) check_shape(kWho, "norm", whole[i], {hidden_size});
  for (const at::Tensor& table : whole) {
    DYNABERT_CHECK_VALUE(table.scalar_type() == whole[0].scalar_type(), kWho, "tables.dtype",
                         table.scalar_type(), whole[0].scalar_type(), "Convert them to one dtype");
  }
  const Element element = element_of(kWho, whole[0]);
  const std::int64_t batch_size = input_ids.size(0), seq_len = input_ids.size(1);
  const std::int64_t places = batch_size * seq_len;
  const Ids words("input_ids", input_ids, batch_size, seq_len, whole[0].size(0));
  const auto positions = some_ids("position_ids", position_ids, input_ids, whole[1].size(0));
  const auto segments = some_ids("token_type_ids", token_type_ids, input_ids, whole[2].size(0));
  DYNABERT_CHECK_VALUE(positions.has_value() ||
                           (first_position >= 0 && first_position + seq_len <= whole[1].size(0)),
                       kWho, "first_position", first_position,
                       c10::str("at most ", whole[1].size(0) - seq_len),
                       "The position embeddings end there");
  std::int64_t tokens = places;
  const std::int64_t* places_of = nullptr;
  if (indices.has_value()) {
    check_shape(kWho, "indices", *indices, {-1});
    DYNABERT_CHECK_VALUE(indices->scalar_type() == at::kLong && indices->is_contiguous(), kWho,
                         "indices", indices->toString(), "contiguous int64",
                         "Use dynabert_kernels.varlen");
    tokens = indices->numel();
    places_of = indices->const_data_ptr<std::int64_t>();
  }
  std::vector<TokenRows> rows(static_cast<std::size_t>(tokens));
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t place = places_of == nullptr ? t : places_of[t];
    DYNABERT_CHECK_VALUE(place >= 0 && place < places, kWho, "indices", place,
                         c10::str("0 to ", places - 1), "Use dynabert_kernels.varlen");
    rows[t] = {words.at(place),
               positions.has_value() ? positions->at(place) : first_position + place % seq_len,
               segments.has_value() ? segments->at(place) : 0};
  }
  at::Tensor output = at::empty({tokens, hidden_size}, whole[0].options());
  const EmbeddingArgs args{element,
                           hidden_size,
                           rows.data(),
                           whole[0].const_data_ptr(),
                           whole[1].const_data_ptr(),
                           whole[2].const_data_ptr(),
                           whole[3].const_data_ptr(),
                           whole[4].const_data_ptr(),
                           static_cast<float>(norm_eps),
                           output.mutable_data_ptr()};
  const EmbedRows embed = active_rows();
  at::parallel_for(0, tokens, kRowsPerThread, [&](std::int64_t begin, std::int64_t end) {
    ScratchFrame frame;
    embed(args, begin, end,
          static_cast<float*>(frame.take(round_up(hidden_size, kLanes) * sizeof(float))));
  });
  return output;
}

namespace {

template <class Value>
std::tuple<at::Tensor, at::Tensor, std::int64_t, std::int64_t> unpad_as(const at::Tensor& mask) {
  const std::int64_t batch_size = mask.size(0), seq_len = mask.size(1);
  const auto* real = mask.const_data_ptr<Value>();
  at::Tensor offsets = at::empty({batch_size + 1}, at::kInt);
  auto* ends = offsets.mutable_data_ptr<std::int32_t>();
  ends[0] = 0;
  std::int64_t total = 0, longest = 0;
  for (std::int64_t b = 0; b < batch_size; ++b) {
    std::int64_t length = 0;
    for (std::int64_t s = 0; s < seq_len; ++s) length += real[b * seq_len + s] != Value{0};
    total += length;
    longest = std::max(longest, length);
    ends[b + 1] = static_cast<std::int32_t>(total);
  }
  const bool is_dense = total == batch_size * seq_len;
  at::Tensor indices = at::empty({is_dense ? 0 : total}, at::kLong);
  auto* to = indices.mutable_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; !is_dense && i < batch_size * seq_len; ++i) {
    if (real[i] != Value{0}) *to++ = i;
  }
  return {offsets, indices, is_dense ? seq_len : longest, total};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, std::int64_t, std::int64_t> unpad_cpu(
    const at::Tensor& attention_mask) {
  check_shape("unpad", "attention_mask", attention_mask, {-1, -1});
  DYNABERT_CHECK_VALUE(attention_mask.numel() <= std::numeric_limits<std::int32_t>::max(), "unpad",
                       "attention_mask.shape", attention_mask.sizes(), "fewer than 2^31 tokens",
                       "Split the batch");
  const at::Tensor mask = attention_mask.contiguous();
  switch (mask.scalar_type()) {
    case at::kLong:
      return unpad_as<std::int64_t>(mask);
    case at::kInt:
      return unpad_as<std::int32_t>(mask);
    case at::kBool:
      return unpad_as<bool>(mask);
    default:
      return unpad_as<bool>(mask.ne(0));
  }
}

}  // namespace dynabert
