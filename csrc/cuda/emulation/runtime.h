// The part of CUDA's runtime that launchers and test programs use. Work is done when it is asked
// for, in the calling thread; streams only tell who is recording a graph.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "memory.h"

using EmulatedWork = std::function<cudaError_t()>;

// What the runtime's opaque pointers point to.
struct CUgraph_st {
  std::vector<EmulatedWork> work;
};
struct CUgraphExec_st {
  std::vector<EmulatedWork> work;
};
struct CUstream_st {
  CUgraph_st* recording = nullptr;
};

namespace dynabert::emulation {

// One kernel, one change of the allocations at a time.
inline std::recursive_mutex mutex;
inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

inline int number_from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::atoi(text) : otherwise;
}

struct DeviceProperties {
  int capability = number_from_environment("DYNABERT_EMULATED_CAPABILITY", 80);
  int multiprocessors = number_from_environment("DYNABERT_EMULATED_MULTIPROCESSORS", 4);

  int max_shared_bytes() const {
    switch (capability) {
      case 80:
      case 87:
        return 163 * 1024;
      case 90:
      case 100:
        return 227 * 1024;
      default:
        return 99 * 1024;
    }
  }
};

inline const DeviceProperties& device_properties() {
  static const DeviceProperties properties;
  return properties;
}

// Carries `work` out, or records it where the stream records.
inline cudaError_t submit(cudaStream_t stream, EmulatedWork work) {
  if (stream != nullptr && stream->recording != nullptr) {
    stream->recording->work.push_back(std::move(work));
    return cudaSuccess;
  }
  const std::lock_guard lock(mutex);
  return remember(work());
}

}  // namespace dynabert::emulation

// Every file that includes this defines them; the linker keeps one.
#define DYNABERT_RUNTIME extern "C" __attribute__((weak)) cudaError_t

DYNABERT_RUNTIME cudaMalloc(void** pointer, std::size_t bytes) {
  const std::lock_guard lock(dynabert::emulation::mutex);
  *pointer = dynabert::emulation::allocations.allocate(bytes);
  return dynabert::emulation::remember(*pointer != nullptr ? cudaSuccess
                                                           : cudaErrorMemoryAllocation);
}
DYNABERT_RUNTIME cudaFree(void* pointer) {
  const std::lock_guard lock(dynabert::emulation::mutex);
  if (pointer == nullptr || dynabert::emulation::allocations.release(pointer)) return cudaSuccess;
  return dynabert::emulation::remember(cudaErrorInvalidValue);
}
DYNABERT_RUNTIME cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                                 cudaStream_t stream) {
  using dynabert::emulation::check_global;
  if (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) {
    check_global(to, bytes, 1, "cudaMemcpy");
  }
  if (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) {
    check_global(from, bytes, 1, "cudaMemcpy");
  }
  return dynabert::emulation::submit(stream, [=] {
    if (bytes > 0) std::memmove(to, from, bytes);
    return cudaSuccess;
  });
}
DYNABERT_RUNTIME cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
DYNABERT_RUNTIME cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  dynabert::emulation::check_global(to, bytes, 1, "cudaMemset");
  return dynabert::emulation::submit(stream, [=] {
    if (bytes > 0) std::memset(to, value, bytes);
    return cudaSuccess;
  });
}
DYNABERT_RUNTIME cudaMemset(void* to, int value, std::size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

DYNABERT_RUNTIME cudaGetLastError() {
  const cudaError_t error = dynabert::emulation::last_error;
  dynabert::emulation::last_error = cudaSuccess;
  return error;
}
DYNABERT_RUNTIME cudaPeekAtLastError() { return dynabert::emulation::last_error; }
extern "C" __attribute__((weak)) const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  text = error == cudaSuccess ? "no error" : "CUDA error " + std::to_string(error);
  return text.c_str();
}
extern "C" __attribute__((weak)) const char* cudaGetErrorName(cudaError_t error) {
  return cudaGetErrorString(error);
}

DYNABERT_RUNTIME cudaDeviceSynchronize() { return cudaSuccess; }
DYNABERT_RUNTIME cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaSetDevice(int device) {
  return dynabert::emulation::remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
DYNABERT_RUNTIME cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const auto& properties = dynabert::emulation::device_properties();
  if (device != 0) return dynabert::emulation::remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.capability % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = properties.max_shared_bytes();
      return cudaSuccess;
    default:
      return dynabert::emulation::remember(cudaErrorInvalidValue);
  }
}
DYNABERT_RUNTIME cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool fits = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize &&
                    value <= dynabert::emulation::device_properties().max_shared_bytes();
  return dynabert::emulation::remember(fits ? cudaSuccess : cudaErrorInvalidValue);
}

DYNABERT_RUNTIME cudaStreamCreate(cudaStream_t* stream) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
DYNABERT_RUNTIME cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
DYNABERT_RUNTIME cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->recording = new CUgraph_st;
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = stream->recording;
  stream->recording = nullptr;
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                      unsigned long long) {
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  for (const EmulatedWork& work : executable->work) {
    if (const cudaError_t error = dynabert::emulation::submit(stream, work)) return error;
  }
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
DYNABERT_RUNTIME cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

#undef DYNABERT_RUNTIME
