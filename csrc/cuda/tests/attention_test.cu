// Compares attention_core.h and attention_cuda.h with double precision on the CPU, on random ragged
// batches and widths. On a card, also under compute-sanitizer, or emulated.
//
// Sources: attention_test.cu, ../../attention/attention_c*.cu, ../gemm_sm80*.cu, ../gemm_sm90.cu,
// ../layer_norm.cu, ../row_tiles.cu.
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a SOURCES -o attention_test
//   g++ -std=c++20 -O1 -x c++ -I/usr/local/cuda/include SOURCES -o attention_test
// attention_test [cases] [seed] [core or sublayer]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../attention/attention_core.h"
#include "../../attention/attention_cuda.h"
#include "../device.cuh"
#include "../gemm_sm90.h"
#include "../launch.cuh"

namespace {

using dynabert::ElementType;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

std::mt19937 generator;

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
template <class T>
T one_of(std::initializer_list<T> values) {
  return values.begin()[uniform(0, static_cast<int>(values.size()) - 1)];
}

// What the card sees of a number, and the number that it then is.
struct Element {
  ElementType type;
  float rounded(float value) const {
    switch (type) {
      case ElementType::kBfloat16:
        return __bfloat162float(__float2bfloat16(value));
      case ElementType::kFloat16:
        return __half2float(__float2half(value));
      default:
        return value;
    }
  }
  void write(void* to, float value) const {
    const __nv_bfloat16 bfloat = __float2bfloat16(value);
    const __half half = __float2half(value);
    switch (type) {
      case ElementType::kBfloat16:
        std::memcpy(to, &bfloat, 2);
        return;
      case ElementType::kFloat16:
        std::memcpy(to, &half, 2);
        return;
      default:
        std::memcpy(to, &value, 4);
    }
  }
  float read(const void* from) const {
    __nv_bfloat16 bfloat;
    __half half;
    float value;
    switch (type) {
      case ElementType::kBfloat16:
        std::memcpy(&bfloat, from, 2);
        return __bfloat162float(bfloat);
      case ElementType::kFloat16:
        std::memcpy(&half, from, 2);
        return __half2float(half);
      default:
        std::memcpy(&value, from, 4);
        return value;
    }
  }
};

// A tensor on the device with its values on the host.
struct Tensor {
  Element element;
  std::vector<float> host;
  unsigned char* device = nullptr;

  // Poisoned: every element is NaN until it is written.
  Tensor(ElementType type, std::size_t size) : element{type}, host(size, std::nanf("")) {
    check(cudaMalloc(reinterpret_cast<void**>(&device), std::max<std::size_t>(bytes(), 16)),
          "cudaMalloc");
    check(cudaMemset(device, 0xff, bytes()), "cudaMemset");
  }
  Tensor(ElementType type, std::size_t size, float mean, float deviation) : Tensor(type, size) {
    std::normal_distribution<float> normal(mean, deviation);
    for (float& value : host) value = element.rounded(normal(generator));
    upload();
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { cudaFree(device); }

  std::size_t bytes() const { return host.size() * dynabert::element_bytes(element.type); }
  void poison(std::size_t begin, std::size_t end) {
    std::fill(host.begin() + begin, host.begin() + end, std::nanf(""));
  }
  void upload() {
    std::vector<unsigned char> raw(bytes());
    const int size = dynabert::element_bytes(element.type);
    for (std::size_t i = 0; i < host.size(); ++i) element.write(&raw[i * size], host[i]);
    check(cudaMemcpy(device, raw.data(), raw.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void read_back() {
    std::vector<unsigned char> raw(bytes());
    check(cudaMemcpy(raw.data(), device, raw.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    const int size = dynabert::element_bytes(element.type);
    for (std::size_t i = 0; i < host.size(); ++i) host[i] = element.read(&raw[i * size]);
  }
};

struct DeviceInts {
  std::int32_t* device = nullptr;
  explicit DeviceInts(const std::vector<std::int32_t>& values) {
    check(cudaMalloc(reinterpret_cast<void**>(&device), values.size() * 4 + 4), "cudaMalloc");
    check(cudaMemcpy(device, values.data(), values.size() * 4, cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
  DeviceInts(const DeviceInts&) = delete;
  ~DeviceInts() { cudaFree(device); }
};

// The largest relative error of a row: an error in a single row does not drown in the others.
struct Error {
  double largest = 0.0;
  void add(const std::vector<double>& got, const std::vector<double>& expected) {
    double difference = 0.0, truth = 1e-30;
    for (std::size_t i = 0; i < got.size(); ++i) {
      difference += (got[i] - expected[i]) * (got[i] - expected[i]);
      truth += expected[i] * expected[i];
    }
    const double error = std::sqrt(difference / truth);
    if (!(error <= largest)) largest = error;  // keeps a NaN
  }
  bool acceptable(double limit) const { return largest < limit; }
};

// Sequences back to back, then rows that belong to none; and heads of each.
struct Batch {
  std::vector<std::int32_t> offsets = {0}, heads;
  int batch, tokens, max_seqlen, limit;
  bool on_device, mixed;
  DeviceInts cu_seqlens, each;

  static std::vector<std::int32_t> random_offsets(int longest, int batch) {
    std::vector<std::int32_t> offsets = {0};
    for (int i = 0; i < batch; ++i) {
      const int length = one_of({0, longest, uniform(0, longest), uniform(1, (longest + 3) / 4)});
      offsets.push_back(offsets.back() + length);
    }
    return offsets;
  }
  // What device memory holds may be out of range.
  static std::vector<std::int32_t> random_heads(int count, int limit) {
    std::vector<std::int32_t> heads(count);
    for (std::int32_t& each : heads) each = one_of({uniform(1, limit), limit, 0, limit + 3, -2});
    return heads;
  }

  Batch(int longest, int limit, int slack, std::vector<std::int32_t> begin,
        std::vector<std::int32_t> widths)
      : offsets(std::move(begin)),
        heads(std::move(widths)),
        batch(static_cast<int>(offsets.size()) - 1),
        tokens(offsets.back() + slack),
        max_seqlen(longest),
        limit(limit),
        on_device(!heads.empty()),
        mixed(heads.size() > 1),
        cu_seqlens(offsets),
        each(heads) {}

  dynabert::Widths widths() const {
    return {limit, on_device ? each.device : nullptr, static_cast<std::int32_t>(heads.size())};
  }
  int width(int sequence) const {
    return on_device ? std::clamp(heads[mixed ? sequence : 0], 0, limit) : limit;
  }
  int widest() const {
    int widest = 0;
    for (int i = 0; i < batch; ++i) widest = std::max(widest, width(i));
    return widest;
  }
};

Batch random_batch(int longest, int most, int limit) {
  const int batch = uniform(1, most);
  const int form = uniform(0, 2);
  return Batch(
      longest, limit, uniform(0, 1) * uniform(0, 40), Batch::random_offsets(longest, batch),
      form == 0 ? std::vector<std::int32_t>() : Batch::random_heads(form == 1 ? 1 : batch, limit));
}

// Context of one query: values of `length` keys, weighted.
template <class Query, class Key, class Value>
std::vector<double> attend(int length, int head_dim, Query query, Key key, Value value) {
  std::vector<double> weight(length), context(head_dim, 0.0);
  double top = -INFINITY, sum = 0.0;
  for (int i = 0; i < length; ++i) {
    weight[i] = 0.0;
    for (int d = 0; d < head_dim; ++d) weight[i] += double(query(d)) * key(i, d);
    weight[i] /= std::sqrt(double(head_dim));
    top = std::max(top, weight[i]);
  }
  for (double& each : weight) sum += each = std::exp(each - top);
  for (int i = 0; i < length; ++i) {
    for (int d = 0; d < head_dim; ++d) context[d] += weight[i] / sum * value(i, d);
  }
  return context;
}

bool test_core() {
  const ElementType type = one_of({ElementType::kBfloat16, ElementType::kFloat16});
  const int head_dim = one_of({32, 64, 80, 128}), limit = uniform(1, 4);
  const int longest =
      one_of({uniform(1, 33), uniform(33, 70), uniform(70, 128), 128, uniform(129, 300)});
  const Batch batch = random_batch(longest, longest < 70 ? 12 : 4, limit);
  const int qkv_stride = limit * 3 * head_dim + 8 * uniform(0, 2);
  const int context_stride = limit * head_dim + 8 * uniform(0, 2);
  // Wide scores make the maximum move; narrow ones spread the weights over all keys.
  Tensor qkv(type, std::size_t(batch.tokens) * qkv_stride, 0.0f, one_of({0.5f, 1.0f, 3.0f}));
  Tensor context(type, std::size_t(batch.tokens) * context_stride);
  for (int t = 0; t < batch.tokens; ++t) {
    const int sequence =
        static_cast<int>(std::upper_bound(batch.offsets.begin(), batch.offsets.end(), t) -
                         batch.offsets.begin() - 1);
    const int width = sequence < batch.batch ? batch.width(sequence) : 0;
    qkv.poison(std::size_t(t) * qkv_stride + width * 3 * head_dim, std::size_t(t + 1) * qkv_stride);
  }
  qkv.upload();
  dynabert::AttentionCore call = {type,        qkv.device,     context.device,
                                  qkv_stride,  context_stride, batch.cu_seqlens.device,
                                  batch.batch, batch.tokens,   batch.max_seqlen,
                                  head_dim,    batch.widths()};
  check(dynabert::attention_core(call, nullptr), "attention_core");
  check(cudaDeviceSynchronize(), "attention_core");
  context.read_back();

  Error error;
  bool untouched = true;
  for (int s = 0; s <= batch.batch; ++s) {
    const int begin = batch.offsets[s], end = s < batch.batch ? batch.offsets[s + 1] : batch.tokens;
    const int width = s < batch.batch ? batch.width(s) : 0;
    for (int t = begin; t < end; ++t) {
      const float* row = &context.host[std::size_t(t) * context_stride];
      for (int i = width * head_dim; i < context_stride; ++i) untouched &= std::isnan(row[i]);
      for (int h = 0; h < width; ++h) {
        const auto part = [&](int token, int which, int d) {
          return qkv.host[std::size_t(token) * qkv_stride + (h * 3 + which) * head_dim + d];
        };
        const float* got = row + h * head_dim;
        error.add({got, got + head_dim},
                  attend(
                      end - begin, head_dim, [&](int d) { return part(t, 0, d); },
                      [&](int i, int d) { return part(begin + i, 1, d); },
                      [&](int i, int d) { return part(begin + i, 2, d); }));
      }
    }
  }

  // Alone, a sequence gives the same bits.
  bool same = true;
  const int s = uniform(0, batch.batch - 1), begin = batch.offsets[s];
  const int length = batch.offsets[s + 1] - begin;
  if (length > 0) {
    const DeviceInts offsets({0, length}), width({batch.width(s)});
    Tensor alone(type, std::size_t(length) * context_stride);
    call.qkv = qkv.device + std::size_t(begin) * qkv_stride * 2;
    call.context = alone.device;
    call.cu_seqlens = offsets.device;
    call.batch = 1;
    call.tokens = call.max_seqlen = length;
    call.heads = {limit, width.device, 1};
    check(dynabert::attention_core(call, nullptr), "attention_core");
    check(cudaDeviceSynchronize(), "attention_core");
    alone.read_back();
    same = std::memcmp(alone.host.data(), &context.host[std::size_t(begin) * context_stride],
                       alone.host.size() * sizeof(float)) == 0;
  }

  // The probabilities and the result are rounded, to 8 or 11 bits.
  const bool half = type == ElementType::kFloat16;
  if (error.acceptable(half ? 1e-3 : 7e-3) && untouched && same) return true;
  std::printf(
      "core: %s head_dim %d limit %d batch %d tokens %d longest %d widths %d: error %.3g%s%s\n",
      half ? "fp16" : "bf16", head_dim, limit, batch.batch, batch.tokens, batch.max_seqlen,
      static_cast<int>(batch.heads.size()), error.largest,
      untouched ? "" : ", wrote beyond a width", same ? "" : ", other bits for a sequence alone");
  return false;
}

// Filled with zeros once, for all calls; null where the card has no use for it.
void* norm_workspace() {
  static void* memory = [] {
    void* zeros = nullptr;
    if (dynabert::compute_capability() != 90) return zeros;
    std::size_t bytes = 0;
    check(dynabert::gemm_norm_workspace_bytes(&bytes), "gemm_norm_workspace_bytes");
    check(cudaMalloc(&zeros, bytes), "cudaMalloc");
    check(cudaMemset(zeros, 0, bytes), "cudaMemset");
    return zeros;
  }();
  return memory;
}

bool test_sublayer() {
  const ElementType compute = one_of({ElementType::kBfloat16, ElementType::kFloat16});
  const ElementType hidden_type = one_of({compute, compute, ElementType::kFloat32});
  const ElementType norm_type = one_of({hidden_type, ElementType::kFloat32});
  const int head_dim = one_of({32, 64, 80, 128}), full = uniform(1, 4), limit = uniform(1, full);
  const int hidden = one_of({8 * uniform(1, 24), 64 * uniform(1, 4), 768});
  const int longest = one_of({uniform(1, 40), uniform(41, 128), uniform(129, 160)});
  const Batch batch = random_batch(longest, longest <= 40 ? 6 : 2, limit);
  const int x_stride = hidden + 8 * uniform(0, 2), residual_stride = hidden + 8 * uniform(0, 2);
  const bool same_input = hidden_type == compute && uniform(0, 1);
  const bool fused = uniform(0, 1);

  Tensor x(compute, std::size_t(batch.tokens) * x_stride, 0.0f, 1.0f);
  // A row mean far from zero shows a variance computed by cancellation; a small deviation leaves
  // the word to the attention.
  Tensor residual(hidden_type, std::size_t(batch.tokens) * residual_stride, 2.0f, 0.125f);
  x.poison(std::size_t(batch.offsets.back()) * x_stride, x.host.size());
  x.upload();
  Tensor qkv_weight(compute, std::size_t(full) * 3 * head_dim * hidden, 0.0f,
                    1.5f / std::sqrt(float(hidden)));
  Tensor qkv_bias(compute, std::size_t(full) * 3 * head_dim, 0.0f, 0.5f);
  Tensor out_weight(compute, std::size_t(full) * head_dim * hidden, 0.0f,
                    1.0f / std::sqrt(float(limit * head_dim)));
  Tensor out_bias(compute, hidden, 0.0f, 1.0f);
  Tensor norm_weight(norm_type, hidden, 1.0f, 0.2f), norm_bias(norm_type, hidden, 0.0f, 1.0f);
  const int used = batch.widest() * head_dim;
  qkv_weight.poison(std::size_t(used) * 3 * hidden, qkv_weight.host.size());
  qkv_bias.poison(std::size_t(used) * 3, qkv_bias.host.size());
  out_weight.poison(std::size_t(used) * hidden, out_weight.host.size());
  for (Tensor* each : {&qkv_weight, &qkv_bias, &out_weight}) each->upload();
  const Tensor& added = same_input ? x : residual;
  const int added_stride = same_input ? x_stride : residual_stride;

  Tensor out(hidden_type, std::size_t(batch.tokens) * hidden);
  dynabert::AttentionCall call = {};
  call.compute = compute;
  call.hidden_type = hidden_type;
  call.norm_type = norm_type;
  call.x = x.device;
  call.residual = added.device;
  call.qkv_weight = qkv_weight.device;
  call.qkv_bias = qkv_bias.device;
  call.out_weight = out_weight.device;
  call.out_bias = out_bias.device;
  call.norm_weight = norm_weight.device;
  call.norm_bias = norm_bias.device;
  call.norm_eps = 1e-12f;
  call.out = out.device;
  call.x_stride = x_stride;
  call.residual_stride = added_stride;
  call.tokens = batch.tokens;
  call.hidden_size = hidden;
  call.full_width = full;
  call.head_dim = head_dim;
  call.heads = batch.widths();
  call.cu_seqlens = batch.cu_seqlens.device;
  call.batch = batch.batch;
  call.max_seqlen = batch.max_seqlen;
  call.norm_workspace = fused ? norm_workspace() : nullptr;
  // Poisoned: a kernel that reads what no other has written finds NaN.
  Tensor workspace(ElementType::kFloat32, dynabert::attention_workspace_bytes(call) / 4);
  call.workspace = workspace.device;
  if (const char* why = dynabert::attention_why_not(call)) {
    std::printf("attention_why_not: %s\n", why);
    return false;
  }
  check(dynabert::attention_forward(call, nullptr), "attention_forward");
  check(cudaDeviceSynchronize(), "attention_forward");
  out.read_back();

  Error error;
  for (int s = 0; s < batch.batch; ++s) {
    const int begin = batch.offsets[s], length = batch.offsets[s + 1] - begin;
    const int width = batch.width(s) * head_dim;
    std::vector<double> qkv(std::size_t(length) * width * 3);  // [length, heads, 3, head_dim]
    for (int t = 0; t < length; ++t) {
      for (int n = 0; n < width * 3; ++n) {
        double sum = qkv_bias.host[n];
        for (int c = 0; c < hidden; ++c) {
          sum += double(x.host[std::size_t(begin + t) * x_stride + c]) *
                 qkv_weight.host[std::size_t(n) * hidden + c];
        }
        qkv[std::size_t(t) * width * 3 + n] = sum;
      }
    }
    for (int t = 0; t < length; ++t) {
      std::vector<double> row(hidden), got(hidden);
      for (int c = 0; c < hidden; ++c) {
        row[c] = double(out_bias.host[c]) + added.host[std::size_t(begin + t) * added_stride + c];
        got[c] = out.host[std::size_t(begin + t) * hidden + c];
      }
      for (int h = 0; h < width / head_dim; ++h) {
        const auto part = [&](int token, int which, int d) {
          return qkv[std::size_t(token) * width * 3 + (h * 3 + which) * head_dim + d];
        };
        const std::vector<double> context = attend(
            length, head_dim, [&](int d) { return part(t, 0, d); },
            [&](int i, int d) { return part(i, 1, d); },
            [&](int i, int d) { return part(i, 2, d); });
        for (int d = 0; d < head_dim; ++d) {
          for (int c = 0; c < hidden; ++c) {
            row[c] += context[d] * out_weight.host[std::size_t(h * head_dim + d) * hidden + c];
          }
        }
      }
      double mean = 0.0, variance = 0.0;
      for (const double value : row) mean += value / hidden;
      for (const double value : row) variance += (value - mean) * (value - mean) / hidden;
      for (int c = 0; c < hidden; ++c) {
        row[c] =
            (row[c] - mean) / std::sqrt(variance + 1e-12) * norm_weight.host[c] + norm_bias.host[c];
      }
      error.add(got, row);
    }
  }
  const bool half = compute == ElementType::kFloat16;
  if (error.acceptable(half ? 2.5e-3 : 2e-2)) return true;
  std::printf(
      "sublayer: %s hidden_type %d norm_type %d hidden %d heads %d of %d x %d batch %d "
      "tokens %d longest %d widths %d: error %.3g\n",
      half ? "fp16" : "bf16", static_cast<int>(hidden_type), static_cast<int>(norm_type), hidden,
      limit, full, head_dim, batch.batch, batch.tokens, batch.max_seqlen,
      static_cast<int>(batch.heads.size()), error.largest);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  generator.seed(argc > 2 ? std::atoi(argv[2]) : std::random_device{}());
  const std::string only = argc > 3 ? argv[3] : "";
  int failures = 0;
  for (int i = 0; i < cases; ++i) {
    const bool core = only.empty() ? i % 2 == 0 : only == "core";
    failures += !(core ? test_core() : test_sublayer());
  }
  std::printf("%d cases, %d failed\n", cases, failures);
  return failures != 0;
}
