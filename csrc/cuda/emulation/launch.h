// Launching a kernel on the emulated device.

#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../launch_shape.h"
#include "grid.h"
#include "meet.h"
#include "runtime.h"

namespace dynabert::emulation {

inline std::unique_ptr<Block> make_block(const LaunchShape& shape, Cluster& cluster,
                                         std::uint64_t index) {
  auto block = std::make_unique<Block>();
  block->index = {static_cast<unsigned>(index % shape.grid.x),
                  static_cast<unsigned>(index / shape.grid.x % shape.grid.y),
                  static_cast<unsigned>(index / shape.grid.x / shape.grid.y)};
  block->cluster = &cluster;
  block->rank = static_cast<int>(index % shape.cluster);
  block->shared_bytes = shape.shared_bytes;
  const std::size_t padded = (shape.shared_bytes / 1024 + 1) * 1024;
  block->memory = static_cast<unsigned char*>(std::aligned_alloc(1024, padded));
  if (block->memory == nullptr) fail("no memory for a block");
  std::memset(block->memory, kPoison, padded);
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  block->live_threads = static_cast<int>(threads);
  for (unsigned first = 0; first < threads; first += kWarpSize) {
    auto warp = std::make_unique<Warp>();
    warp->block = block.get();
    warp->index = static_cast<int>(first / kWarpSize);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      Thread& thread = warp->threads[lane];
      const unsigned number = first + static_cast<unsigned>(lane);
      thread.warp = warp.get();
      thread.lane = lane;
      thread.done = number >= threads;
      thread.index = {number % shape.block.x, number / shape.block.x % shape.block.y,
                      number / shape.block.x / shape.block.y};
    }
    block->warps.push_back(std::move(warp));
  }
  return block;
}

inline std::unique_ptr<Cluster> make_cluster(const LaunchShape& shape, std::uint64_t index) {
  auto cluster = std::make_unique<Cluster>();
  for (unsigned rank = 0; rank < shape.cluster; ++rank) {
    cluster->blocks.push_back(make_block(shape, *cluster, index * shape.cluster + rank));
    cluster->live_threads += cluster->blocks.back()->live_threads;
  }
  return cluster;
}

inline void run_grid(const LaunchShape& shape, const std::function<void()>& body) {
  if (scheduler != nullptr) fail("a kernel launches another one");
  gridDim = shape.grid;
  blockDim = shape.block;
  const std::uint64_t count =
      static_cast<std::uint64_t>(shape.grid.x) / shape.cluster * shape.grid.y * shape.grid.z;
  const auto run = [&](std::vector<std::unique_ptr<Cluster>>& clusters) {
    Scheduler own(body);
    scheduler = &own;
    own.run(clusters);
    scheduler = nullptr;
    clusters.clear();
  };
  std::vector<std::uint64_t> order(count);
  std::iota(order.begin(), order.end(), std::uint64_t{0});
  std::vector<std::unique_ptr<Cluster>> resident;
  for (std::uint64_t left = count; left > 0; --left) {
    std::swap(order[left - 1], order[random_draw.below(static_cast<std::uint32_t>(left))]);
    resident.push_back(make_cluster(shape, order[left - 1]));
    if (!shape.cooperative) run(resident);
  }
  if (shape.cooperative) run(resident);
}

inline cudaError_t check_shape(const LaunchShape& shape) {
  const DeviceProperties& device = device_properties();
  const std::uint64_t threads =
      static_cast<std::uint64_t>(shape.block.x) * shape.block.y * shape.block.z;
  const std::uint64_t blocks =
      static_cast<std::uint64_t>(shape.grid.x) * shape.grid.y * shape.grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || shape.block.z > 64 ||
      shape.grid.x > 0x7fffffffu || shape.grid.y > 65535 || shape.grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shape.shared_bytes > static_cast<std::size_t>(device.max_shared_bytes())) {
    return cudaErrorInvalidValue;
  }
  const bool hopper = device.capability >= 90;
  if (shape.cluster < 1 || shape.cluster > 8 || shape.grid.x % shape.cluster != 0 ||
      (shape.cluster > 1 && !hopper)) {
    return cudaErrorInvalidClusterSize;
  }
  if (shape.programmatic && !hopper) return cudaErrorNotSupported;
  // One block of a cooperative grid per multiprocessor: what every kernel here counts on.
  if (shape.cooperative && blocks > static_cast<std::uint64_t>(device.multiprocessors)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

inline cudaError_t max_active_clusters(int* clusters, const LaunchShape& shape) {
  LaunchShape alone = shape;
  alone.cooperative = false;
  if (const cudaError_t error = check_shape(alone)) return remember(error);
  *clusters = device_properties().multiprocessors / static_cast<int>(shape.cluster);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   Arguments&&... arguments) {
  if (const cudaError_t error = check_shape(shape)) return remember(error);
  // Parameters are copied at the launch, as on a card.
  std::tuple<std::remove_cvref_t<Parameters>...> parameters(
      static_cast<std::remove_cvref_t<Parameters>>(std::forward<Arguments>(arguments))...);
  return submit(stream, [kernel, shape, parameters] {
    run_grid(shape, [&] { std::apply(kernel, parameters); });
    return cudaSuccess;
  });
}

}  // namespace dynabert::emulation
