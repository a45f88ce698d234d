// Compares encoder_cuda.h with a float64 reference on the CPU, on random models, subnets and
// sequence lengths; each captured launch is replayed for a second subnet whose layers and
// widths are only written to device memory.
//
// nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a encoder_test.cu
//   ../../encoder/encoder_cuda.cu -o encoder_test
// encoder_test [number of cases] [seed]; also meant to run under compute-sanitizer.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../../encoder/encoder_cuda.h"

namespace {

using dynabert::EncoderCall;
using dynabert::EncoderLayer;
using dynabert::EncoderShape;

constexpr float kEps = 1e-12f;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

std::mt19937 generator;

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// A bf16 tensor on the device with its values on the host.
struct Tensor {
  std::vector<double> host;
  __nv_bfloat16* device = nullptr;

  Tensor(std::size_t size, double mean, double deviation) : host(size) {
    std::normal_distribution<double> normal(mean, deviation);
    std::vector<__nv_bfloat16> bits(size);
    for (std::size_t i = 0; i < size; ++i) {
      bits[i] = __float2bfloat16(static_cast<float>(normal(generator)));
      host[i] = __bfloat162float(bits[i]);
    }
    check(cudaMalloc(&device, size * 2), "cudaMalloc");
    check(cudaMemcpy(device, bits.data(), size * 2, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { cudaFree(device); }
};

template <typename T>
struct DeviceArray {
  T* data = nullptr;
  explicit DeviceArray(const std::vector<T>& host) {
    check(cudaMalloc(&data, std::max<std::size_t>(host.size(), 1) * sizeof(T)), "cudaMalloc");
    write(host);
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data); }
  void write(const std::vector<T>& host) {
    check(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
};

struct Layer {
  Tensor qkv_weight, qkv_bias, out_weight, out_bias, attention_norm_weight, attention_norm_bias;
  Tensor up_weight, up_bias, down_weight, down_bias, ffn_norm_weight, ffn_norm_bias;

  Layer(std::size_t c, std::size_t head_columns, std::size_t i)
      : qkv_weight(3 * head_columns * c, 0, 1.2 / std::sqrt(c)),
        qkv_bias(3 * head_columns, 0, 0.2),
        out_weight(head_columns * c, 0, 1.5 / std::sqrt(head_columns)),
        out_bias(c, 0, 0.2),
        attention_norm_weight(c, 1, 0.2),
        attention_norm_bias(c, 0, 0.2),
        up_weight(i * c, 0, 1 / std::sqrt(c)),
        up_bias(i, 0, 0.2),
        down_weight(i * c, 0, 1.5 / std::sqrt(i)),
        down_bias(c, 0, 0.2),
        ffn_norm_weight(c, 1, 0.2),
        ffn_norm_bias(c, 0, 0.2) {}

  EncoderLayer pointers() const {
    return {qkv_weight.device,
            qkv_bias.device,
            out_weight.device,
            out_bias.device,
            attention_norm_weight.device,
            attention_norm_bias.device,
            up_weight.device,
            up_bias.device,
            down_weight.device,
            down_bias.device,
            ffn_norm_weight.device,
            ffn_norm_bias.device};
  }
};

struct Subnet {
  std::vector<std::int32_t> layers, heads, neurons;  // padded to the model's layers
  int kept;
};

Subnet random_subnet(const EncoderShape& shape, bool one_width) {
  Subnet subnet;
  subnet.layers.resize(shape.layers);
  std::iota(subnet.layers.begin(), subnet.layers.end(), 0);
  std::shuffle(subnet.layers.begin(), subnet.layers.end(), generator);
  subnet.kept = uniform(0, 9) == 0 ? 0 : uniform(1, shape.layers);
  for (int i = 0; i < shape.layers; ++i) {
    subnet.heads.push_back(uniform(1, shape.max_heads));
    subnet.neurons.push_back(uniform(1, shape.max_intermediate));
    if (one_width) {
      subnet.heads.back() = subnet.heads[0];
      subnet.neurons.back() = subnet.neurons[0];
    }
  }
  return subnet;
}

// y[n] += sum over k of x[k] * w[n, k], or of w[k, n].
void multiply(const double* x, const double* w, int n, int k, bool transposed, double* y) {
  for (int i = 0; i < n && !transposed; ++i) {
    for (int j = 0; j < k; ++j) y[i] += x[j] * w[static_cast<std::size_t>(i) * k + j];
  }
  for (int j = 0; j < k && transposed; ++j) {
    for (int i = 0; i < n; ++i) y[i] += x[j] * w[static_cast<std::size_t>(j) * n + i];
  }
}

void layer_norm(double* x, int c, const double* weight, const double* bias) {
  double mean = 0, squares = 0;
  for (int i = 0; i < c; ++i) mean += x[i] / c;
  for (int i = 0; i < c; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const double scale = 1 / std::sqrt(squares / c + kEps);
  for (int i = 0; i < c; ++i) x[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

using Rows = std::vector<std::vector<double>>;

void reference_layer(const Layer& layer, int heads, int head_dim, int neurons,
                     const std::vector<std::int32_t>& cu_seqlens, Rows& hidden) {
  const int tokens = static_cast<int>(hidden.size()), c = static_cast<int>(hidden[0].size());
  const int head_columns = heads * head_dim;
  Rows qkv(tokens), context(tokens, std::vector<double>(head_columns, 0.0));
  for (int row = 0; row < tokens; ++row) {
    qkv[row].assign(layer.qkv_bias.host.begin(), layer.qkv_bias.host.begin() + 3 * head_columns);
    multiply(hidden[row].data(), layer.qkv_weight.host.data(), 3 * head_columns, c, false,
             qkv[row].data());
  }
  for (std::size_t s = 0; s + 1 < cu_seqlens.size(); ++s) {
    for (int head = 0; head < heads; ++head) {
      for (int row = cu_seqlens[s]; row < cu_seqlens[s + 1]; ++row) {
        const double* query = &qkv[row][head * 3 * head_dim];
        double sum = 0;
        for (int key = cu_seqlens[s]; key < cu_seqlens[s + 1]; ++key) {
          const double* other = &qkv[key][head * 3 * head_dim];
          double score = 0;
          for (int d = 0; d < head_dim; ++d) score += query[d] * other[head_dim + d];
          const double weight = std::exp(score / std::sqrt(head_dim));
          sum += weight;
          for (int d = 0; d < head_dim; ++d) {
            context[row][head * head_dim + d] += weight * other[2 * head_dim + d];
          }
        }
        for (int d = 0; d < head_dim; ++d) context[row][head * head_dim + d] /= sum;
      }
    }
  }
  for (int row = 0; row < tokens; ++row) {
    std::vector<double>& h = hidden[row];
    for (int i = 0; i < c; ++i) h[i] += layer.out_bias.host[i];
    multiply(context[row].data(), layer.out_weight.host.data(), c, head_columns, true, h.data());
    layer_norm(h.data(), c, layer.attention_norm_weight.host.data(),
               layer.attention_norm_bias.host.data());
    std::vector<double> up(layer.up_bias.host.begin(), layer.up_bias.host.begin() + neurons);
    multiply(h.data(), layer.up_weight.host.data(), neurons, c, false, up.data());
    for (double& x : up) x = 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    for (int i = 0; i < c; ++i) h[i] += layer.down_bias.host[i];
    multiply(up.data(), layer.down_weight.host.data(), c, neurons, true, h.data());
    layer_norm(h.data(), c, layer.ffn_norm_weight.host.data(), layer.ffn_norm_bias.host.data());
  }
}

// Relative error of the output, or infinity where an element was not written.
double error_of(const std::vector<__nv_bfloat16>& output, const Rows& truth) {
  double difference = 0, total = 0;
  std::size_t i = 0;
  for (const std::vector<double>& row : truth) {
    for (const double x : row) {
      const double got = __bfloat162float(output[i++]);
      if (!std::isfinite(got)) return INFINITY;
      difference += (got - x) * (got - x);
      total += x * x;
    }
  }
  return std::sqrt(difference / total);
}

bool run_case(int index) {
  constexpr int kHeadDims[] = {32, 64};
  EncoderShape shape{};
  shape.layers = uniform(1, 3);
  shape.hidden_size = 128 * uniform(1, 4);
  shape.head_dim = kHeadDims[uniform(0, 1)];
  shape.max_heads = uniform(1, shape.hidden_size / shape.head_dim);
  shape.max_intermediate = uniform(1, 4 * shape.hidden_size);
  shape.sequences = uniform(1, 6);
  std::vector<std::int32_t> cu_seqlens = {0};
  const int longest = index % 4 == 0 ? 512 / shape.sequences : 40;
  for (int s = 0; s < shape.sequences; ++s) {
    cu_seqlens.push_back(cu_seqlens.back() + uniform(1, longest));
  }
  shape.tokens = cu_seqlens.back();
  if (const char* why = dynabert::encoder_why_not(shape)) {
    std::printf("case %d cannot run: %s\n", index, why);
    return false;
  }

  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<EncoderLayer> pointers;
  for (int i = 0; i < shape.layers; ++i) {
    layers.push_back(std::make_unique<Layer>(shape.hidden_size, shape.max_heads * shape.head_dim,
                                             shape.max_intermediate));
    pointers.push_back(layers.back()->pointers());
  }
  const std::size_t elements = static_cast<std::size_t>(shape.tokens) * shape.hidden_size;
  Tensor input(elements, 0, 1), output(elements, 0, 1);
  const bool one_width = uniform(0, 1);
  Subnet subnet = random_subnet(shape, one_width);
  DeviceArray<EncoderLayer> weights(pointers);
  DeviceArray<std::int32_t> cu(cu_seqlens), kept({subnet.kept}), list(subnet.layers),
      heads(subnet.heads), neurons(subnet.neurons);
  const std::size_t bytes = dynabert::encoder_workspace_bytes(shape);
  char* workspace = nullptr;
  check(cudaMalloc(&workspace, bytes), "cudaMalloc");
  check(cudaMemset(workspace, 0, bytes), "cudaMemset");

  EncoderCall call{};
  call.hidden = input.device;
  call.output = output.device;
  call.cu_seqlens = cu.data;
  call.weights = weights.data;
  call.num_kept = kept.data;
  call.layer_list = list.data;
  call.num_heads = heads.data;
  call.intermediate_size = neurons.data;
  call.one_width = one_width;
  call.norm_eps = kEps;
  call.workspace = workspace;

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
  check(dynabert::encoder_forward(shape, call, stream), "captured launch");
  check(cudaStreamEndCapture(stream, &graph), "end capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");

  bool passed = true;
  for (int round = 0; round < 2; ++round) {
    if (round == 1) {
      subnet = random_subnet(shape, one_width);
      kept.write({subnet.kept});
      list.write(subnet.layers);
      heads.write(subnet.heads);
      neurons.write(subnet.neurons);
    }
    Rows truth(shape.tokens);
    for (int row = 0; row < shape.tokens; ++row) {
      const auto begin = input.host.begin() + static_cast<std::ptrdiff_t>(row) * shape.hidden_size;
      truth[row].assign(begin, begin + shape.hidden_size);
    }
    for (int i = 0; i < subnet.kept; ++i) {
      reference_layer(*layers[subnet.layers[i]], subnet.heads[i], shape.head_dim, subnet.neurons[i],
                      cu_seqlens, truth);
    }
    // Eager, then the graph twice, over poison: everything behind the barrier's counter.
    std::vector<std::vector<__nv_bfloat16>> results;
    for (int repeat = 0; repeat < 3; ++repeat) {
      check(cudaMemset(output.device, 0xff, elements * 2), "cudaMemset");
      check(cudaMemset(workspace + 256, 0xff, bytes - 256), "cudaMemset");
      check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
      if (repeat == 0) {
        check(dynabert::encoder_forward(shape, call, stream), "launch");
      } else {
        check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
      }
      check(cudaStreamSynchronize(stream), "kernel");
      results.emplace_back(elements);
      check(cudaMemcpy(results.back().data(), output.device, elements * 2, cudaMemcpyDeviceToHost),
            "cudaMemcpy");
    }
    const auto same_bits = [](__nv_bfloat16 a, __nv_bfloat16 b) {
      return __bfloat16_as_ushort(a) == __bfloat16_as_ushort(b);
    };
    const bool same =
        std::equal(results[0].begin(), results[0].end(), results[1].begin(), same_bits) &&
        std::equal(results[0].begin(), results[0].end(), results[2].begin(), same_bits);
    const double error = error_of(results[0], truth);
    if (error < 2e-2 && same) continue;
    passed = false;
    std::printf(
        "case %d round %d: error %.3g%s; tokens %d of %d sequences, hidden %d, head_dim %d, "
        "kept %d, heads %d, neurons %d\n",
        index, round, error, same ? "" : ", bits differ", shape.tokens, shape.sequences,
        shape.hidden_size, shape.head_dim, subnet.kept, subnet.heads[0], subnet.neurons[0]);
  }
  check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  check(cudaFree(workspace), "cudaFree");
  return passed;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 50;
  generator.seed(argc > 2 ? std::atoi(argv[2]) : std::random_device{}());
  int failed = 0;
  for (int i = 0; i < cases; ++i) failed += run_case(i) ? 0 : 1;
  std::printf("%d cases, %d failed\n", cases, failed);
  return failed != 0;
}
