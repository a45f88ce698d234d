// Launching kernels, on a card or emulated, and what launchers ask of the device.

#pragma once

#include <atomic>
#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

#include "device.cuh"
#include "launch_shape.h"
#ifndef __CUDACC__
#include "emulation/launch.h"
#endif

namespace dynabert {

namespace launch_detail {

inline constexpr int kMaxDevices = 64;

// An attribute of the current device, asked for once; 0 where no device answers.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  static std::atomic<int> known[kMaxDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  int value = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (value != 0) return value;
  if (cudaDeviceGetAttribute(&value, kAttribute, device) != cudaSuccess) return 0;
  if (device < kMaxDevices) known[device].store(value, std::memory_order_relaxed);
  return value;
}

// Kernels get 48 KiB of shared memory unless they ask, once per kernel and device.
inline cudaError_t allow_shared_bytes(const void* kernel, std::size_t bytes) {
  constexpr std::size_t kAlwaysAllowed = 48 * 1024;
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  struct Allowed {
    const void* kernel;
    int device;
    std::size_t bytes;
  };
  static std::mutex mutex;
  static std::vector<Allowed> all;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard lock(mutex);
  Allowed* allowed = nullptr;
  for (Allowed& each : all) {
    if (each.kernel == kernel && each.device == device) allowed = &each;
  }
  if (allowed != nullptr && allowed->bytes >= bytes) return cudaSuccess;
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))) {
    return error;
  }
  if (allowed != nullptr) {
    allowed->bytes = bytes;
  } else {
    all.push_back({kernel, device, bytes});
  }
  return cudaSuccess;
}

#ifdef __CUDACC__
struct Config {
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};

  // A cluster of one block is what a launch has anyway; a question about clusters must name it.
  Config(const LaunchShape& shape, cudaStream_t stream, bool names_cluster) {
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    const auto next = [&](cudaLaunchAttributeID id) -> cudaLaunchAttributeValue& {
      attributes[config.numAttrs].id = id;
      return attributes[config.numAttrs++].val;
    };
    if (names_cluster) next(cudaLaunchAttributeClusterDimension).clusterDim = {shape.cluster, 1, 1};
    if (shape.cooperative) next(cudaLaunchAttributeCooperative).cooperative = 1;
    if (shape.programmatic) {
      next(cudaLaunchAttributeProgrammaticStreamSerialization)
          .programmaticStreamSerializationAllowed = 1;
    }
  }
  Config(const Config&) = delete;  // `config` points into it
};
#endif

}  // namespace launch_detail

inline int multiprocessors() {
  return launch_detail::device_attribute<cudaDevAttrMultiProcessorCount>();
}

// 80, 86, 89, 90, ...; 0 where no device answers.
inline int compute_capability() {
  return launch_detail::device_attribute<cudaDevAttrComputeCapabilityMajor>() * 10 +
         launch_detail::device_attribute<cudaDevAttrComputeCapabilityMinor>();
}

// Bytes of shared memory that a block may have.
inline int max_shared_bytes() {
  return launch_detail::device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
}

// Arguments are converted to the kernel's parameters. Returns the launch's own error; waits for
// nothing on a card.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const LaunchShape& shape,
                          cudaStream_t stream, Arguments&&... arguments) {
  if (const cudaError_t error = launch_detail::allow_shared_bytes(
          reinterpret_cast<const void*>(kernel), shape.shared_bytes)) {
    return error;
  }
#ifdef __CUDACC__
  const launch_detail::Config launch(shape, stream, shape.cluster > 1);
  return cudaLaunchKernelEx(&launch.config, kernel, std::forward<Arguments>(arguments)...);
#else
  return emulation::launch(kernel, shape, stream, std::forward<Arguments>(arguments)...);
#endif
}

// How many clusters of this shape the device holds at once; `grid` is the largest wanted.
template <typename... Parameters>
cudaError_t max_active_clusters(int* clusters, void (*kernel)(Parameters...),
                                const LaunchShape& shape) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = launch_detail::allow_shared_bytes(function, shape.shared_bytes)) {
    return error;
  }
#ifdef __CUDACC__
  const launch_detail::Config launch(shape, nullptr, true);
  return cudaOccupancyMaxActiveClusters(clusters, function, &launch.config);
#else
  return emulation::max_active_clusters(clusters, shape);
#endif
}

}  // namespace dynabert
