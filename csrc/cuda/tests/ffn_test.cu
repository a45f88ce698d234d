// Compares ffn_cuda.h and layer_norm.h with double precision on the CPU, on random ragged batches
// and widths. On a card, also under compute-sanitizer, or emulated.
//
// Sources: ffn_test.cu, ../../ffn/ffn_cuda.cu, ../gemm_sm80*.cu, ../gemm_sm90.cu, ../layer_norm.cu,
// ../row_tiles.cu.
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a SOURCES -o ffn_test
//   g++ -std=c++20 -O1 -x c++ -I/usr/local/cuda/include SOURCES -o ffn_test
// ffn_test [cases] [seed] [sublayer or norm]

#include <string>

#include "../../ffn/ffn_cuda.h"
#include "../gemm_sm90.h"
#include "../launch.cuh"
#include "../layer_norm.h"
#include "device_tensor.h"

namespace {

using namespace dynabert;
using namespace dynabert::testing;

#ifdef __CUDACC__
constexpr int kLargest = 600;
#else
constexpr int kLargest = 90;
#endif

// The largest error of a row, relative to the row: a wrong row does not drown in the others.
struct Error {
  double largest = 0.0;
  void add(const float* got, const std::vector<double>& expected) {
    double difference = 0.0, truth = 1e-30;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      difference += (got[i] - expected[i]) * (got[i] - expected[i]);
      truth += expected[i] * expected[i];
    }
    const double error = std::sqrt(difference / truth);
    if (!(error <= largest)) largest = error;  // keeps a NaN
  }
};

void normalise(std::vector<double>& row, const Tensor& weight, const Tensor& bias, double eps) {
  double mean = 0.0, variance = 0.0;
  for (const double value : row) mean += value / row.size();
  for (const double value : row) variance += (value - mean) * (value - mean) / row.size();
  for (std::size_t c = 0; c < row.size(); ++c) {
    row[c] = (row[c] - mean) / std::sqrt(variance + eps) * weight.host[c] + bias.host[c];
  }
}

ElementType any_type() {
  return one_of({ElementType::kFloat32, ElementType::kBfloat16, ElementType::kFloat16});
}

bool test_norm() {
  const ElementType projected_type = one_of({ElementType::kBfloat16, ElementType::kFloat16});
  const ElementType hidden_type = any_type(), norm_type = any_type();
  const bool has_projected = uniform(0, 3) != 0, in_place = uniform(0, 1);
  const int hidden = 8 * (uniform(0, 1) ? uniform(1, 128) : uniform(129, 1024));
  const int tokens = uniform(1, 40), stride = hidden + 8 * uniform(0, 2);
  const std::size_t size = static_cast<std::size_t>(tokens) * stride;
  const Tensor projected(projected_type, size, 0.0f, 1.0f);
  // A mean far from zero shows a variance computed by cancellation.
  Tensor residual(hidden_type, size, 8.0f, 1.0f), other(hidden_type, size);
  const Tensor weight(norm_type, hidden, 1.0f, 0.2f), bias(norm_type, hidden, 0.0f, 1.0f);
  const std::vector<float> before = residual.host;
  Tensor& out = in_place ? residual : other;

  LayerNormCall call = {};
  call.projected_type = projected_type;
  call.hidden_type = hidden_type;
  call.norm_type = norm_type;
  call.projected = has_projected ? projected.device : nullptr;
  call.residual = residual.device;
  call.norm_weight = weight.device;
  call.norm_bias = bias.device;
  call.out = out.device;
  call.projected_stride = call.residual_stride = call.out_stride = stride;
  call.tokens = tokens;
  call.hidden_size = hidden;
  call.norm_eps = 1e-12f;
  check(layer_norm(call, nullptr), "layer_norm");
  check(cudaDeviceSynchronize(), "layer_norm");
  out.read_back();

  Error error;
  std::vector<double> row(hidden);
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < hidden; ++c) {
      const std::size_t index = std::size_t(t) * stride + c;
      row[c] = double(before[index]) + (has_projected ? projected.host[index] : 0.0);
    }
    normalise(row, weight, bias, 1e-12);
    error.add(&out.host[std::size_t(t) * stride], row);
  }
  // Rounding the result, and a few operations in float on numbers around eight.
  const double limit = out.element.unit() + 2e-6;
  if (error.largest <= limit) return true;
  std::printf(
      "norm: tokens %d hidden %d types %d %d %d projected %d in place %d: error %.3g of %.3g\n",
      tokens, hidden, static_cast<int>(projected_type), static_cast<int>(hidden_type),
      static_cast<int>(norm_type), has_projected, in_place, error.largest, limit);
  return false;
}

double truth_of(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * x *
             (1.0 + std::tanh(std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    default:
      return x > 0.0 ? x : 0.0;
  }
}

// Filled with zeros once, for all calls: each must leave it as it was.
void* norm_workspace() {
  static void* const memory = [] {
    std::size_t bytes = 0;
    void* zeros = nullptr;
    check(gemm_norm_workspace_bytes(&bytes), "gemm_norm_workspace_bytes");
    check(cudaMalloc(&zeros, bytes), "cudaMalloc");
    check(cudaMemset(zeros, 0, bytes), "cudaMemset");
    return zeros;
  }();
  return memory;
}

struct Sublayer {
  Tensor x, up, up_bias, down, down_bias, norm, norm_bias;
  int hidden, x_stride;
  Activation activation;

  // Row t, with the roundings between the kernels.
  std::vector<double> row(int t, int width, const Tensor& residual, int residual_stride) const {
    std::vector<double> sums(down_bias.host.begin(), down_bias.host.end());
    for (int n = 0; n < width; ++n) {
      double sum = up_bias.host[n];
      for (int c = 0; c < hidden; ++c) {
        sum += double(x.host[std::size_t(t) * x_stride + c]) * up.host[std::size_t(n) * hidden + c];
      }
      const double neuron = x.element.rounded(static_cast<float>(truth_of(activation, sum)));
      for (int c = 0; c < hidden; ++c) sums[c] += neuron * down.host[std::size_t(n) * hidden + c];
    }
    for (int c = 0; c < hidden; ++c) {
      sums[c] = double(x.element.rounded(static_cast<float>(sums[c]))) +
                residual.host[std::size_t(t) * residual_stride + c];
    }
    normalise(sums, norm, norm_bias, 1e-12);
    return sums;
  }
};

bool test_sublayer() {
  const bool hopper = compute_capability() == 90;
  const ElementType compute = hopper && uniform(0, 1)
                                  ? ElementType::kBfloat16
                                  : one_of({ElementType::kBfloat16, ElementType::kFloat16});
  const ElementType hidden_type = one_of({ElementType::kFloat32, compute});
  const ElementType norm_type = one_of({ElementType::kFloat32, compute});
  const bool mixed = uniform(0, 2) == 0, on_device = uniform(0, 1), fused = uniform(0, 1);
  const int hidden =
      hopper && uniform(0, 2) ? one_of({64, 192, kFusedNormHiddenSize}) : 8 * uniform(1, 30);
  const int full = uniform(1, 300), limit = uniform(1, full), batch = mixed ? uniform(2, 6) : 1;
  std::vector<std::int32_t> starts = random_offsets(batch, 2 * kLargest / batch), widths;
  for (int i = 0; i < batch; ++i) widths.push_back(uniform(1, limit));
  const int widest = *std::max_element(widths.begin(), widths.end());
  const int tokens = starts.back() + (mixed ? uniform(0, 5) : 1);
  const int x_stride = hidden + 8 * uniform(0, 2), residual_stride = hidden + 8 * uniform(0, 2);

  const std::size_t weight_size = static_cast<std::size_t>(full) * hidden;
  const float deviation = 1.0f / std::sqrt(static_cast<float>(hidden));
  Sublayer layer = {{compute, static_cast<std::size_t>(tokens) * x_stride, 0.0f, 1.0f},
                    {compute, weight_size, 0.0f, deviation},
                    {compute, static_cast<std::size_t>(full), 0.0f, 1.0f},
                    {compute, weight_size, 0.0f, 1.0f / std::sqrt(static_cast<float>(widest))},
                    {compute, static_cast<std::size_t>(hidden), 0.0f, 1.0f},
                    {norm_type, static_cast<std::size_t>(hidden), 1.0f, 0.2f},
                    {norm_type, static_cast<std::size_t>(hidden), 0.0f, 1.0f},
                    hidden,
                    x_stride,
                    one_of({Activation::kGelu, Activation::kGeluTanh, Activation::kRelu})};
  layer.up.poison(std::size_t(widest) * hidden, weight_size);
  layer.down.poison(std::size_t(widest) * hidden, weight_size);
  layer.up_bias.poison(widest, full);
  layer.up.upload();
  layer.down.upload();
  layer.up_bias.upload();
  const Tensor residual(hidden_type, static_cast<std::size_t>(tokens) * residual_stride, 8.0f,
                        1.0f);
  Tensor out(hidden_type, static_cast<std::size_t>(tokens) * hidden);
  const DeviceInts offsets(starts), each(widths);

  FfnCall call = {};
  call.compute = compute;
  call.hidden_type = hidden_type;
  call.norm_type = norm_type;
  call.activation = layer.activation;
  call.x = layer.x.device;
  call.residual = residual.device;
  call.up_weight = layer.up.device;
  call.up_bias = layer.up_bias.device;
  call.down_weight = layer.down.device;
  call.down_bias = layer.down_bias.device;
  call.norm_weight = layer.norm.device;
  call.norm_bias = layer.norm_bias.device;
  call.norm_eps = 1e-12f;
  call.out = out.device;
  call.x_stride = x_stride;
  call.residual_stride = residual_stride;
  call.tokens = tokens;
  call.hidden_size = hidden;
  call.full_width = full;
  call.neurons = {mixed || on_device ? limit : widths[0],
                  mixed || on_device ? each.device : nullptr,
                  mixed       ? batch
                  : on_device ? 1
                              : 0};
  call.cu_seqlens = mixed ? offsets.device : nullptr;
  call.batch = batch;
  call.norm_workspace = hopper && fused ? norm_workspace() : nullptr;
  // Any content: NaN.
  const Tensor workspace(ElementType::kFloat32, ffn_workspace_bytes(call) / 4);
  call.workspace = workspace.device;
  const char* const why_not = ffn_why_not(call);
  if (why_not == nullptr) check(ffn_forward(call, nullptr), "ffn_forward");
  check(cudaDeviceSynchronize(), "ffn_forward");
  out.read_back();

  Error error;
  for (int sequence = 0; sequence < batch; ++sequence) {
    const int begin = starts[sequence], end = mixed ? starts[sequence + 1] : tokens;
    if (begin == end) continue;
    for (const int t : {begin, uniform(begin, end - 1), end - 1}) {
      error.add(&out.host[std::size_t(t) * hidden],
                layer.row(t, widths[sequence], residual, residual_stride));
    }
  }
  // Roundings that fall the other way in the neurons and the projected sum, and of the result.
  const double limit_of_error =
      0.6 * (Element{compute}.unit() + Element{hidden_type}.unit()) + 2e-6;
  if (why_not == nullptr && error.largest <= limit_of_error) return true;
  std::printf(
      "sublayer: tokens %d batch %d hidden %d limit %d of %d types %d %d %d activation %d device "
      "%d "
      "fused %d: error %.3g of %.3g %s\n",
      tokens, batch, hidden, limit, full, static_cast<int>(compute), static_cast<int>(hidden_type),
      static_cast<int>(norm_type), static_cast<int>(layer.activation), on_device, fused,
      error.largest, limit_of_error, why_not != nullptr ? why_not : "");
  return false;
}

bool test_refusals() {
  FfnCall call = {};
  call.compute = ElementType::kBfloat16;
  call.hidden_size = 64;
  call.full_width = 100;
  call.neurons = {100, nullptr, 0};
  call.batch = 3;
  const auto refuses = [&](auto change) {
    FfnCall bad = call;
    change(bad);
    return ffn_why_not(bad) != nullptr && ffn_forward(bad, nullptr) == cudaErrorNotSupported;
  };
  return ffn_why_not(call) == nullptr && ffn_forward(call, nullptr) == cudaSuccess &&
         refuses([](FfnCall& bad) { bad.compute = ElementType::kFloat32; }) &&
         refuses([](FfnCall& bad) { bad.hidden_size = 60; }) &&
         refuses([](FfnCall& bad) { bad.hidden_size = kMaxNormHiddenSize + 8; }) &&
         refuses([](FfnCall& bad) { bad.neurons.limit = 101; }) &&
         refuses([](FfnCall& bad) { bad.neurons.limit = 0; }) &&
         refuses([](FfnCall& bad) { bad.neurons.num_each = 2; });
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 60;
  generator.seed(argc > 2 ? std::atoi(argv[2]) : std::random_device{}());
  const std::string only = argc > 3 ? argv[3] : "";
  int failures = !test_refusals();
  for (int i = 0; i < cases; ++i) {
    const bool norm = only.empty() ? i % 3 == 2 : only == "norm";
    failures += !(norm ? test_norm() : test_sublayer());
  }
  std::printf("%d cases, %d failed\n", cases, failures);
  return failures != 0;
}
