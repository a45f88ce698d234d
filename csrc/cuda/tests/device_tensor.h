// What the test programs share: tensors on the device with their values on the host, and chance.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "../device.cuh"
#include "../types.h"

namespace dynabert::testing {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

inline std::mt19937 generator;

inline int uniform(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(generator);
}

template <class T>
T one_of(std::initializer_list<T> values) {
  return values.begin()[uniform(0, static_cast<int>(values.size()) - 1)];
}

// What the device sees of a number, and the number that it then is.
struct Element {
  ElementType type;

  float rounded(float value) const {
    unsigned char bytes[4];
    write(bytes, value);
    return read(bytes);
  }
  // A bound of the relative error of rounding.
  double unit() const {
    return type == ElementType::kBfloat16  ? std::ldexp(1.0, -8)
           : type == ElementType::kFloat16 ? std::ldexp(1.0, -11)
                                           : std::ldexp(1.0, -24);
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

struct Tensor {
  Element element;
  std::vector<float> host;
  unsigned char* device = nullptr;

  // Poisoned: every element is NaN until it is written.
  Tensor(ElementType type, std::size_t size) : element{type}, host(size, std::nanf("")) {
    check(cudaMalloc(reinterpret_cast<void**>(&device), std::max<std::size_t>(bytes(), 1)),
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

  std::size_t bytes() const { return host.size() * element_bytes(element.type); }
  unsigned char* at(std::size_t index) const {
    return device + index * element_bytes(element.type);
  }
  void poison(std::size_t begin, std::size_t end) {
    std::fill(host.begin() + begin, host.begin() + end, std::nanf(""));
  }
  void upload() {
    std::vector<unsigned char> raw(bytes());
    const int size = element_bytes(element.type);
    for (std::size_t i = 0; i < host.size(); ++i) element.write(&raw[i * size], host[i]);
    check(cudaMemcpy(device, raw.data(), raw.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void read_back() {
    std::vector<unsigned char> raw(bytes());
    check(cudaMemcpy(raw.data(), device, raw.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    const int size = element_bytes(element.type);
    for (std::size_t i = 0; i < host.size(); ++i) host[i] = element.read(&raw[i * size]);
  }
};

struct DeviceInts {
  std::int32_t* device = nullptr;

  explicit DeviceInts(const std::vector<std::int32_t>& values) {
    check(cudaMalloc(reinterpret_cast<void**>(&device), values.size() * 4), "cudaMalloc");
    check(cudaMemcpy(device, values.data(), values.size() * 4, cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
  DeviceInts(const DeviceInts&) = delete;
  ~DeviceInts() { cudaFree(device); }
};

// Offsets of sequences of 0 to `longest` rows.
inline std::vector<std::int32_t> random_offsets(int batch, int longest) {
  std::vector<std::int32_t> offsets = {0};
  for (int i = 0; i < batch; ++i) offsets.push_back(offsets.back() + uniform(0, longest));
  return offsets;
}

}  // namespace dynabert::testing
