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

#ifdef __CUDACC__
constexpr int kMostTokens = 700, kMostRows = 1536;
#else
constexpr int kMostTokens = 300, kMostRows = 480;  // emulated
#endif

std::mt19937 generator;

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// A bf16 tensor on the device with its values on the host: [size / row, row] numbers, of which
// those past `used` in a row are NaN, as are those past the first `rows` rows.
struct Tensor {
  std::vector<float> host;
  __nv_bfloat16* device = nullptr;

  Tensor(std::size_t size, float mean, float deviation, std::size_t row = 1, std::size_t used = 1,
         std::size_t rows = SIZE_MAX)
      : host(size) {
    std::normal_distribution<float> normal(mean, deviation);
    std::vector<__nv_bfloat16> bits(size);
    for (std::size_t i = 0; i < size; ++i) {
      const bool in_use = i % row < used && i / row < rows;
      bits[i] = __float2bfloat16(in_use ? normal(generator) : NAN);
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
  bool acceptable() const { return std::sqrt(difference) <= 3e-3 * std::sqrt(truth); }  // not NaN
};

// A width of `count` heads or neurons, `rows` rows of a weight of `full`.
struct Width {
  int unit, count, rows, full;
};

Width random_width() {
  constexpr int kUnits[] = {1, 1, 32, 64, 96, 240};
  const int unit = kUnits[uniform(0, 5)], most = uniform(1, kMostRows / unit);
  const int count = uniform(1, most);
  return {unit, count, count * unit, most * unit};
}

double activated(dynabert::Activation activation, double x) {
  switch (activation) {
    case dynabert::Activation::kNone:
      return x;
    case dynabert::Activation::kGelu:
      return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    case dynabert::Activation::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case dynabert::Activation::kRelu:
      return std::fmax(x, 0.0);
  }
  return NAN;
}

bool test_rows() {
  const Width w = random_width();
  const int tokens = uniform(1, kMostTokens), hidden = 64 * uniform(1, 16);
  const auto activation = static_cast<dynabert::Activation>(uniform(0, 3));
  const bool on_device = uniform(0, 1);
  const int x_stride = hidden + 8 * uniform(0, 2);
  const int out_stride = (w.full + 7) / 8 * 8 + 8 * uniform(0, 2);
  Tensor x(static_cast<std::size_t>(tokens) * x_stride, 0.0f, 1.0f);
  Tensor weight(static_cast<std::size_t>(w.full) * hidden, 0.0f, 1.0f / std::sqrt(float(hidden)),
                hidden, hidden, w.rows);
  Tensor bias(w.full, 0.0f, 1.0f, 1, 1, w.rows);
  Tensor out(static_cast<std::size_t>(tokens) * out_stride);
  DeviceInt device_count(w.count);
  check(dynabert::gemm_rows_sm90(
            {x.device,
             weight.device,
             bias.device,
             out.device,
             x_stride,
             out_stride,
             tokens,
             hidden,
             w.full,
             {on_device ? 0 : w.count, on_device ? device_count.device : nullptr, w.unit},
             activation},
            nullptr),
        "gemm_rows_sm90");
  check(cudaDeviceSynchronize(), "gemm_rows_sm90");
  out.read_back();

  Error error;
  bool untouched = true;
  for (const int t : sample_rows(tokens)) {
    for (int n = 0; n < w.rows; ++n) {
      double sum = bias.host[n];
      for (int c = 0; c < hidden; ++c) {
        sum += double(x.host[std::size_t(t) * x_stride + c]) *
               weight.host[std::size_t(n) * hidden + c];
      }
      error.add(out.host[std::size_t(t) * out_stride + n], activated(activation, sum));
    }
    const int undefined = on_device ? 64 : 8;
    for (int n = (w.rows + undefined - 1) / undefined * undefined; n < out_stride; ++n) {
      untouched = untouched && std::isnan(out.host[std::size_t(t) * out_stride + n]);
    }
  }
  if (error.acceptable() && untouched) return true;
  std::printf("rows: tokens %d hidden %d width %d of %d activation %d device %d: error %.3g%s\n",
              tokens, hidden, w.rows, w.full, static_cast<int>(activation), on_device,
              std::sqrt(error.difference / error.truth),
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
  const Width w = random_width();
  const int after = uniform(0, 3);  // nothing, residual, residual and norm twice as often
  const bool norm = after > 1, on_device = uniform(0, 1);
  const int tokens = uniform(1, kMostTokens);
  const int hidden = norm ? dynabert::kFusedNormHiddenSize : 64 * uniform(1, 16);
  const int x_stride = (w.full + 7) / 8 * 8 + 8 * uniform(0, 2);
  Tensor x(static_cast<std::size_t>(tokens) * x_stride, 0.0f, 1.0f, x_stride, w.rows);
  Tensor weight(static_cast<std::size_t>(w.full) * hidden, 0.0f, 1.0f / std::sqrt(float(w.rows)),
                hidden, hidden, w.rows);
  // A row mean far from zero shows a variance computed by cancellation.
  Tensor residual(static_cast<std::size_t>(tokens) * hidden, norm ? 8.0f : 0.0f, 1.0f);
  Tensor bias(hidden, 0.0f, 1.0f), norm_weight(hidden, 1.0f, 0.2f), norm_bias(hidden, 0.0f, 1.0f);
  Tensor out(static_cast<std::size_t>(tokens) * hidden);
  DeviceInt device_count(w.count);
  check(dynabert::gemm_columns_sm90(
            {x.device,
             weight.device,
             bias.device,
             after > 0 ? residual.device : nullptr,
             norm ? norm_weight.device : nullptr,
             norm ? norm_bias.device : nullptr,
             norm ? workspace() : nullptr,
             out.device,
             x_stride,
             hidden,
             hidden,
             tokens,
             hidden,
             w.full,
             {on_device ? 0 : w.count, on_device ? device_count.device : nullptr, w.unit},
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
      row[c] = bias.host[c];
      if (after > 0) row[c] += residual.host[std::size_t(t) * hidden + c];
      for (int n = 0; n < w.rows; ++n) {
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
  std::printf("columns: tokens %d hidden %d width %d of %d after %d device %d: error %.3g\n",
              tokens, hidden, w.rows, w.full, after, on_device,
              std::sqrt(error.difference / error.truth));
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
