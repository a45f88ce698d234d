// Module dynabert_kernels._C_cuda: the launchers of the CUDA kernels for Python, as functions of
// addresses and numbers. No torch here; who calls allocates, checks and keeps memory alive.

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "attention/attention_cuda.h"
#include "build_info.h"
#include "cuda/gemm_sm80.h"
#include "cuda/gemm_sm90.h"
#include "encoder/encoder_cuda.h"
#include "ffn/ffn_cuda.h"

namespace dynabert {
namespace {

using Address = std::uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_at(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

void check(cudaError_t error, const char* who) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(who) + ": CUDA error " + std::to_string(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

// A call that no kernel is made for says why; any other failure is CUDA's.
void check(cudaError_t error, const char* who, const char* why_not) {
  if (error != cudaSuccess && why_not != nullptr) {
    throw std::invalid_argument(std::string(who) + ": " + why_not);
  }
  check(error, who);
}

void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

std::optional<std::string> text_or_none(const char* text) {
  return text == nullptr ? std::nullopt : std::optional<std::string>(text);
}

// --- sublayers

struct SublayerTypes {
  ElementType compute, hidden, norm;
};

SublayerTypes types(int compute, int hidden, int norm) {
  return {static_cast<ElementType>(compute), static_cast<ElementType>(hidden),
          static_cast<ElementType>(norm)};
}

// What the size of a workspace depends on.
FfnCall ffn_sizes(int compute, int hidden_type, int norm_type, std::int32_t tokens,
                  std::int32_t hidden_size, std::int32_t full_width, std::int32_t limit,
                  std::int32_t num_each, std::int32_t batch) {
  const SublayerTypes type = types(compute, hidden_type, norm_type);
  FfnCall call{};
  call.compute = type.compute;
  call.hidden_type = type.hidden;
  call.norm_type = type.norm;
  call.tokens = tokens;
  call.hidden_size = hidden_size;
  call.full_width = full_width;
  call.neurons = {limit, nullptr, num_each};
  call.batch = batch;
  return call;
}

std::size_t ffn_workspace(int device, int compute, int hidden_type, int norm_type,
                          std::int32_t tokens, std::int32_t hidden_size, std::int32_t full_width,
                          std::int32_t limit, std::int32_t num_each, std::int32_t batch) {
  use_device(device);
  return ffn_workspace_bytes(ffn_sizes(compute, hidden_type, norm_type, tokens, hidden_size,
                                       full_width, limit, num_each, batch));
}

void ffn(int device, Address stream, int compute, int hidden_type, int norm_type,
         std::int32_t tokens, std::int32_t hidden_size, std::int32_t full_width, std::int32_t limit,
         std::int32_t num_each, std::int32_t batch, int activation, Address x, Address residual,
         Address up_weight, Address up_bias, Address down_weight, Address down_bias,
         Address norm_weight, Address norm_bias, float norm_eps, Address out, std::int64_t x_stride,
         std::int64_t residual_stride, Address each, Address cu_seqlens, Address workspace,
         Address norm_workspace) {
  use_device(device);
  FfnCall call = ffn_sizes(compute, hidden_type, norm_type, tokens, hidden_size, full_width, limit,
                           num_each, batch);
  call.activation = static_cast<Activation>(activation);
  call.x = at(x);
  call.residual = at(residual);
  call.up_weight = at(up_weight);
  call.up_bias = at(up_bias);
  call.down_weight = at(down_weight);
  call.down_bias = at(down_bias);
  call.norm_weight = at(norm_weight);
  call.norm_bias = at(norm_bias);
  call.norm_eps = norm_eps;
  call.out = at(out);
  call.x_stride = x_stride;
  call.residual_stride = residual_stride;
  call.neurons.each = at<const std::int32_t>(each);
  call.cu_seqlens = at<const std::int32_t>(cu_seqlens);
  call.workspace = at(workspace);
  call.norm_workspace = at(norm_workspace);
  check(ffn_forward(call, stream_at(stream)), "ffn", ffn_why_not(call));
}

AttentionCall attention_sizes(int compute, int hidden_type, int norm_type, std::int32_t tokens,
                              std::int32_t hidden_size, std::int32_t full_width, std::int32_t limit,
                              std::int32_t num_each, std::int32_t batch, std::int32_t head_dim,
                              std::int32_t max_seqlen) {
  const SublayerTypes type = types(compute, hidden_type, norm_type);
  AttentionCall call{};
  call.compute = type.compute;
  call.hidden_type = type.hidden;
  call.norm_type = type.norm;
  call.tokens = tokens;
  call.hidden_size = hidden_size;
  call.full_width = full_width;
  call.heads = {limit, nullptr, num_each};
  call.batch = batch;
  call.head_dim = head_dim;
  call.max_seqlen = max_seqlen;
  return call;
}

std::size_t attention_workspace(int device, int compute, int hidden_type, int norm_type,
                                std::int32_t tokens, std::int32_t hidden_size,
                                std::int32_t full_width, std::int32_t limit, std::int32_t num_each,
                                std::int32_t batch, std::int32_t head_dim,
                                std::int32_t max_seqlen) {
  use_device(device);
  return attention_workspace_bytes(attention_sizes(compute, hidden_type, norm_type, tokens,
                                                   hidden_size, full_width, limit, num_each, batch,
                                                   head_dim, max_seqlen));
}

void attention(int device, Address stream, int compute, int hidden_type, int norm_type,
               std::int32_t tokens, std::int32_t hidden_size, std::int32_t full_width,
               std::int32_t limit, std::int32_t num_each, std::int32_t batch, std::int32_t head_dim,
               std::int32_t max_seqlen, Address x, Address residual, Address qkv_weight,
               Address qkv_bias, Address out_weight, Address out_bias, Address norm_weight,
               Address norm_bias, float norm_eps, Address out, std::int64_t x_stride,
               std::int64_t residual_stride, Address each, Address cu_seqlens, Address workspace,
               Address norm_workspace) {
  use_device(device);
  AttentionCall call = attention_sizes(compute, hidden_type, norm_type, tokens, hidden_size,
                                       full_width, limit, num_each, batch, head_dim, max_seqlen);
  call.x = at(x);
  call.residual = at(residual);
  call.qkv_weight = at(qkv_weight);
  call.qkv_bias = at(qkv_bias);
  call.out_weight = at(out_weight);
  call.out_bias = at(out_bias);
  call.norm_weight = at(norm_weight);
  call.norm_bias = at(norm_bias);
  call.norm_eps = norm_eps;
  call.out = at(out);
  call.x_stride = x_stride;
  call.residual_stride = residual_stride;
  call.heads.each = at<const std::int32_t>(each);
  call.cu_seqlens = at<const std::int32_t>(cu_seqlens);
  call.workspace = at(workspace);
  call.norm_workspace = at(norm_workspace);
  check(attention_forward(call, stream_at(stream)), "attention", attention_why_not(call));
}

// --- products alone, for the benchmarks

void gemm_rows(bool hopper, int device, Address stream, int type, int activation, Address x,
               Address weight, Address bias, Address out, std::int64_t x_stride,
               std::int64_t out_stride, std::int32_t tokens, std::int32_t hidden_size,
               std::int32_t full_width, std::int32_t count, Address device_count,
               std::int32_t unit) {
  use_device(device);
  const PrefixWidth width{count, at<const std::int32_t>(device_count), unit};
  if (hopper) {
    GemmRowsSm90 args{};
    args.x = at(x);
    args.weight = at(weight);
    args.bias = at(bias);
    args.out = at(out);
    args.x_stride = x_stride;
    args.out_stride = out_stride;
    args.tokens = tokens;
    args.hidden_size = hidden_size;
    args.full_width = full_width;
    args.width = width;
    args.activation = static_cast<Activation>(activation);
    check(gemm_rows_sm90(args, stream_at(stream)), "gemm_rows_sm90");
    return;
  }
  GemmSm80 args{};
  args.type = static_cast<ElementType>(type);
  args.activation = static_cast<Activation>(activation);
  args.x = at(x);
  args.weight = at(weight);
  args.bias = at(bias);
  args.out = at(out);
  args.x_stride = x_stride;
  args.out_stride = out_stride;
  args.tokens = tokens;
  args.hidden_size = hidden_size;
  args.full_width = full_width;
  args.width = width;
  check(gemm_rows_sm80(args, stream_at(stream)), "gemm_rows_sm80");
}

void gemm_columns(bool hopper, int device, Address stream, int type, Address x, Address weight,
                  Address bias, Address residual, Address norm_weight, Address norm_bias,
                  Address norm_workspace, float norm_eps, Address out, std::int64_t x_stride,
                  std::int64_t residual_stride, std::int64_t out_stride, std::int32_t tokens,
                  std::int32_t hidden_size, std::int32_t full_width, std::int32_t count,
                  Address device_count, std::int32_t unit) {
  use_device(device);
  const PrefixWidth width{count, at<const std::int32_t>(device_count), unit};
  if (hopper) {
    GemmColumnsSm90 args{};
    args.x = at(x);
    args.weight = at(weight);
    args.bias = at(bias);
    args.residual = at(residual);
    args.norm_weight = at(norm_weight);
    args.norm_bias = at(norm_bias);
    args.norm_workspace = at(norm_workspace);
    args.out = at(out);
    args.x_stride = x_stride;
    args.residual_stride = residual_stride;
    args.out_stride = out_stride;
    args.tokens = tokens;
    args.hidden_size = hidden_size;
    args.full_width = full_width;
    args.width = width;
    args.norm_eps = norm_eps;
    check(gemm_columns_sm90(args, stream_at(stream)), "gemm_columns_sm90");
    return;
  }
  GemmSm80 args{};
  args.type = static_cast<ElementType>(type);
  args.x = at(x);
  args.weight = at(weight);
  args.bias = at(bias);
  args.out = at(out);
  args.x_stride = x_stride;
  args.out_stride = out_stride;
  args.tokens = tokens;
  args.hidden_size = hidden_size;
  args.full_width = full_width;
  args.width = width;
  check(gemm_columns_sm80(args, stream_at(stream)), "gemm_columns_sm80");
}

// --- the persistent encoder

EncoderShape encoder_shape(int tokens, int sequences, int layers, int hidden_size, int head_dim,
                           int max_heads, int max_intermediate) {
  return {tokens, sequences, layers, hidden_size, head_dim, max_heads, max_intermediate};
}

// `weights`: [layers, 12] addresses in the order of EncoderLayer.
void encoder(int device, Address stream, int tokens, int sequences, int layers, int hidden_size,
             int head_dim, int max_heads, int max_intermediate, Address hidden, Address output,
             Address cu_seqlens, Address weights, Address num_kept, Address layer_list,
             Address num_heads, Address intermediate_size, bool one_width, float norm_eps,
             Address workspace) {
  use_device(device);
  const EncoderShape shape =
      encoder_shape(tokens, sequences, layers, hidden_size, head_dim, max_heads, max_intermediate);
  EncoderCall call{};
  call.hidden = at(hidden);
  call.output = at(output);
  call.cu_seqlens = at<const std::int32_t>(cu_seqlens);
  call.weights = at<const EncoderLayer>(weights);
  call.num_kept = at<const std::int32_t>(num_kept);
  call.layer_list = at<const std::int32_t>(layer_list);
  call.num_heads = at<const std::int32_t>(num_heads);
  call.intermediate_size = at<const std::int32_t>(intermediate_size);
  call.one_width = one_width;
  call.norm_eps = norm_eps;
  call.workspace = at(workspace);
  check(encoder_forward(shape, call, stream_at(stream)), "encoder", encoder_why_not(shape));
}

// --- memory that starts as zeros

// Kept for the life of the process, which is how long a stream may be used.
Address zeros(int device, Address stream, std::size_t bytes) {
  use_device(device);
  void* memory = nullptr;
  if (kBuildEmulated) {
    // The emulation, once it has allocated anything, takes tensors for stray pointers.
    memory = std::aligned_alloc(256, (bytes / 256 + 1) * 256);
    std::memset(memory, 0, bytes);
    return reinterpret_cast<Address>(memory);
  }
  check(cudaMalloc(&memory, bytes), "zeros");
  check(cudaMemsetAsync(memory, 0, bytes, stream_at(stream)), "zeros");
  return reinterpret_cast<Address>(memory);
}

std::size_t norm_workspace_bytes(int device) {
  use_device(device);
  std::size_t bytes = 0;
  check(gemm_norm_workspace_bytes(&bytes), "norm_workspace_bytes");
  return bytes;
}

int compute_capability(int device) {
  int major = 0;
  int minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
  return 10 * major + minor;
}

// The driver's and the runtime's versions, such as 13000; the driver's is 0 where there is none.
std::pair<int, int> versions() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  check(cudaRuntimeGetVersion(&runtime), "versions");
  return {driver, runtime};
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["architectures"] = kBuildArchitectures;
  info["ptx"] = kBuildPtx;
  info["nvcc"] = kBuildNvcc;
  info["sources"] = kBuildSources;
  info["emulated"] = kBuildEmulated;
  return info;
}

}  // namespace
}  // namespace dynabert

PYBIND11_MODULE(DYNABERT_CUDA_MODULE, m) {
  using namespace dynabert;
  // A launch waits where the device's queue is full; other threads of Python run meanwhile. The
  // emulation is one thread at a time anyway.
  using Launch = std::conditional_t<kBuildEmulated, pybind11::call_guard<>,
                                    pybind11::call_guard<pybind11::gil_scoped_release>>;
  m.def("attention", &attention, Launch(), "The attention sublayer; see attention_cuda.h.");
  m.def("attention_workspace_bytes", &attention_workspace,
        "Bytes of its workspace, of any content.");
  m.def("ffn", &ffn, Launch(), "The feed-forward sublayer; see ffn_cuda.h.");
  m.def("ffn_workspace_bytes", &ffn_workspace, "Bytes of its workspace, of any content.");
  m.def("norm_workspace_bytes", &norm_workspace_bytes,
        "Bytes of the zeros that a LayerNorm fused into a product needs.");
  m.def("zeros", &zeros, "New memory of zeros, never freed; filled on a stream.");
  m.def("gemm_rows", &gemm_rows, Launch(), "x @ weight[:n].T + bias[:n] and an activation.");
  m.def("gemm_columns", &gemm_columns, Launch(),
        "x[:, :n] @ weight[:n] + bias; on Hopper also residual and LayerNorm.");
  m.def("encoder", &encoder, Launch(), "All kept layers of a small batch; see encoder_cuda.h.");
  m.def("encoder_workspace_bytes",
        [](int device, int tokens, int sequences, int layers, int hidden_size, int head_dim,
           int max_heads, int max_intermediate) {
          use_device(device);
          return encoder_workspace_bytes(encoder_shape(tokens, sequences, layers, hidden_size,
                                                       head_dim, max_heads, max_intermediate));
        });
  m.def("encoder_why_not", [](int device, int tokens, int sequences, int layers, int hidden_size,
                              int head_dim, int max_heads, int max_intermediate) {
    use_device(device);
    return text_or_none(encoder_why_not(encoder_shape(tokens, sequences, layers, hidden_size,
                                                      head_dim, max_heads, max_intermediate)));
  });
  m.def("compute_capability", &compute_capability, "Of a device, such as 90.");
  m.attr("FUSED_NORM_HIDDEN_SIZE") = kFusedNormHiddenSize;
  m.def("versions", &versions, "Of the driver and of the CUDA runtime, such as 13000.");
  m.def("build_info", &build_info, "Architectures, PTX, nvcc's release, hash of the sources.");
}
