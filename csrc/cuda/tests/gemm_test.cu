// Compares gemm_sm90.h with double precision on the CPU, on random prefixes and token counts.
//
// nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a gemm_test.cu ../gemm_sm90.cu -o
// gemm_test gemm_test [number of cases] [seed]; also meant to run under compute-sanitizer.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../gemm_sm90.h"

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

std::mt19937 generator;

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// A bf16 tensor on the device with its values on the host.
struct Tensor {
  std::vector<float> host;
  __nv_bfloat16* device = nullptr;

  Tensor(std::size_t size, float mean, float deviation) : host(size) {
    std::normal_distribution<float> normal(mean, deviation);
    std::vector<__nv_bfloat16> bits(size);
    for (std::size_t i = 0; i < size; ++i) {
      bits[i] = __float2bfloat16(normal(generator));
      host[i] = __bfloat162float(bits[i]);
    }
    check(cudaMalloc(&device, size * 2), "cudaMalloc");
    check(cudaMemcpy(device, bits.data(), size * 2, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  // Poisoned: every element is NaN until a kernel writes it.
  explicit Tensor(std::size_t size) : host(size) {
    check(cudaMalloc(&device, size * 2), "cudaMalloc");
    check(cudaMemset(device, 0xff, size * 2), "cudaMemset");
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { cudaFree(device); }

  void read_back() {
    std::vector<__nv_bfloat16> bits(host.size());
    check(cudaMemcpy(bits.data(), device, bits.size() * 2, cudaMemcpyDeviceToHost), "cudaMemcpy");
    for (std::size_t i = 0; i < host.size(); ++i) host[i] = __bfloat162float(bits[i]);
  }
};

struct DeviceInt {
  std::int32_t* device = nullptr;
  explicit DeviceInt(std::int32_t value) {
    check(cudaMalloc(&device, 4), "cudaMalloc");
    check(cudaMemcpy(device, &value, 4, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  DeviceInt(const DeviceInt&) = delete;
  ~DeviceInt() { cudaFree(device); }
};

// Rows whose every element is compared: a few, the first and the last among them.
std::vector<int> sample_rows(int tokens) {
  std::vector<int> rows = {0, tokens - 1};
  for (int i = 0; i < 4; ++i) rows.push_back(uniform(0, tokens - 1));
  return rows;
}

struct Error {
  double difference = 0.0, truth = 0.0;
  void add(double got, double expected) {
    difference += (got - expected) * (got - expected);
    truth += expected * expected;
  }
  // bf16 has 8 bits: rounding the result alone costs about 1.7e-3.
  bool acceptable() const { return std::sqrt(difference / truth) < 3e-3; }  // false for NaN
};

bool test_rows() {
  const int tokens = uniform(1, 700), hidden = 64 * uniform(1, 16), full = 64 * uniform(1, 24);
  const int unit = 64, count = uniform(1, full / unit), width = count * unit;
  const bool gelu = uniform(0, 1), on_device = uniform(0, 1);
  const int x_stride = hidden + 8 * uniform(0, 2), out_stride = full + 8 * uniform(0, 2);
  Tensor x(static_cast<std::size_t>(tokens) * x_stride, 0.0f, 1.0f);
  Tensor weight(static_cast<std::size_t>(full) * hidden, 0.0f, 1.0f / std::sqrt(float(hidden)));
  Tensor bias(full, 0.0f, 1.0f), out(static_cast<std::size_t>(tokens) * out_stride);
  DeviceInt device_count(count);
  check(dynabert::gemm_rows_sm90(
            {x.device,
             weight.device,
             bias.device,
             out.device,
             x_stride,
             out_stride,
             tokens,
             hidden,
             full,
             {on_device ? 0 : count, on_device ? device_count.device : nullptr, unit},
             gelu},
            nullptr),
        "gemm_rows_sm90");
  check(cudaDeviceSynchronize(), "gemm_rows_sm90");
  out.read_back();

  Error error;
  bool untouched = true;
  for (const int t : sample_rows(tokens)) {
    for (int n = 0; n < width; ++n) {
      double sum = bias.host[n];
      for (int c = 0; c < hidden; ++c) {
        sum += double(x.host[std::size_t(t) * x_stride + c]) *
               weight.host[std::size_t(n) * hidden + c];
      }
      if (gelu) sum = 0.5 * sum * (1.0 + std::erf(sum / std::sqrt(2.0)));
      error.add(out.host[std::size_t(t) * out_stride + n], sum);
    }
    for (int n = width; n < out_stride; ++n) {
      untouched = untouched && std::isnan(out.host[std::size_t(t) * out_stride + n]);
    }
  }
  if (error.acceptable() && untouched) return true;
  std::printf("rows: tokens %d hidden %d width %d of %d gelu %d device %d: error %.3g%s\n", tokens,
              hidden, width, full, gelu, on_device, std::sqrt(error.difference / error.truth),
              untouched ? "" : ", wrote beyond the width");
  return false;
}

// Filled with zeros once, for all calls: each must leave it as it was.
void* workspace() {
  static void* memory = [] {
    std::size_t bytes = 0;
    void* zeros = nullptr;
    check(dynabert::gemm_norm_workspace_bytes(&bytes), "gemm_norm_workspace_bytes");
    check(cudaMalloc(&zeros, bytes), "cudaMalloc");
    check(cudaMemset(zeros, 0, bytes), "cudaMemset");
    return zeros;
  }();
  return memory;
}

bool test_columns() {
  const bool norm = uniform(0, 1), on_device = uniform(0, 1);
  const int tokens = uniform(1, 700), full = 64 * uniform(1, 24);
  const int hidden = norm ? dynabert::kFusedNormHiddenSize : 64 * uniform(1, 16);
  const int unit = 64, count = uniform(1, full / unit), width = count * unit;
  const int x_stride = full + 8 * uniform(0, 2);
  Tensor x(static_cast<std::size_t>(tokens) * x_stride, 0.0f, 1.0f);
  Tensor weight(static_cast<std::size_t>(full) * hidden, 0.0f, 1.0f / std::sqrt(float(width)));
  // A row mean far from zero shows a variance computed by cancellation.
  Tensor residual(static_cast<std::size_t>(tokens) * hidden, norm ? 8.0f : 0.0f, 1.0f);
  Tensor bias(hidden, 0.0f, 1.0f), norm_weight(hidden, 1.0f, 0.2f), norm_bias(hidden, 0.0f, 1.0f);
  Tensor out(static_cast<std::size_t>(tokens) * hidden);
  DeviceInt device_count(count);
  check(dynabert::gemm_columns_sm90(
            {x.device,
             weight.device,
             bias.device,
             residual.device,
             norm ? norm_weight.device : nullptr,
             norm ? norm_bias.device : nullptr,
             norm ? workspace() : nullptr,
             out.device,
             x_stride,
             hidden,
             hidden,
             tokens,
             hidden,
             full,
             {on_device ? 0 : count, on_device ? device_count.device : nullptr, unit},
             1e-12f},
            nullptr),
        "gemm_columns_sm90");
  check(cudaDeviceSynchronize(), "gemm_columns_sm90");
  out.read_back();

  Error error;
  std::vector<double> row(hidden);
  for (const int t : sample_rows(tokens)) {
    double mean = 0.0, variance = 0.0;
    for (int c = 0; c < hidden; ++c) {
      row[c] = double(bias.host[c]) + residual.host[std::size_t(t) * hidden + c];
      for (int n = 0; n < width; ++n) {
        row[c] += double(x.host[std::size_t(t) * x_stride + n]) *
                  weight.host[std::size_t(n) * hidden + c];
      }
      mean += row[c] / hidden;
    }
    for (const double value : row) variance += (value - mean) * (value - mean) / hidden;
    for (int c = 0; c < hidden; ++c) {
      const double expected =
          norm ? (row[c] - mean) / std::sqrt(variance + 1e-12) * norm_weight.host[c] +
                     norm_bias.host[c]
               : row[c];
      error.add(out.host[std::size_t(t) * hidden + c], expected);
    }
  }
  if (error.acceptable()) return true;
  std::printf("columns: tokens %d hidden %d width %d of %d norm %d device %d: error %.3g\n", tokens,
              hidden, width, full, norm, on_device, std::sqrt(error.difference / error.truth));
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  generator.seed(argc > 2 ? std::atoi(argv[2]) : std::random_device{}());
  const std::string only = argc > 3 ? argv[3] : "";
  int failures = 0;
  for (int i = 0; i < cases; ++i)
    failures += !(only != "rows" && (only == "columns" || i % 2) ? test_columns() : test_rows());
  std::printf("%d cases, %d failed\n", cases, failures);
  return failures != 0;
}
