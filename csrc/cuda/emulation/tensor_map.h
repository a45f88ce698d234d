// The tensor copy engine: boxes of a described tensor to and from shared memory, some time after
// they were asked for.

#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#include "grid.h"
#include "mbarrier.h"
#include "shared.h"

namespace dynabert::emulation {

// What the encoder below leaves in the 128 bytes of a CUtensorMap. Dimensions are innermost first.
struct TensorMap {
  static constexpr std::uint32_t kMark = 0x7e4504a9;
  std::uint32_t mark;
  std::uint32_t rank;
  std::uint32_t element_bytes;
  std::uint32_t swizzle_bits;  // of the 16-byte piece's number that are mixed with the line's
  unsigned char* data;
  std::uint64_t dims[3];
  std::uint64_t strides[3];  // in bytes; of the innermost an element
  std::uint32_t box[3];

  std::uint32_t row_bytes() const { return box[0] * element_bytes; }
  std::uint32_t box_bytes() const { return row_bytes() * box[1] * box[2]; }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline TensorMap decode(const CUtensorMap* map) {
  TensorMap decoded;
  std::memcpy(&decoded, map, sizeof(decoded));
  if (decoded.mark != TensorMap::kMark) fail("the tensor map was never encoded");
  return decoded;
}
inline void check_tensor_map(const CUtensorMap* map) { decode(map); }

// Limits are those that the driver's own encoder documents.
inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                  void* data, const cuuint64_t* dims, const cuuint64_t* strides,
                                  const cuuint32_t* box, const cuuint32_t* element_strides,
                                  CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const auto is_multiple = [](std::uint64_t value, std::uint64_t of) { return value % of == 0; };
  TensorMap made = {TensorMap::kMark, rank,      2,        0, static_cast<unsigned char*>(data),
                    {1, 1, 1},        {2, 0, 0}, {1, 1, 1}};
  std::uint32_t span = 0;
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      span = 512;
      break;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      span = 32, made.swizzle_bits = 1;
      break;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      span = 64, made.swizzle_bits = 2;
      break;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      span = 128, made.swizzle_bits = 3;
      break;
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (rank < 2 || rank > 3 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (data == nullptr || !is_multiple(reinterpret_cast<std::uintptr_t>(data), 16)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (cuuint32_t i = 0; i < rank; ++i) {
    made.dims[i] = dims[i];
    made.box[i] = box[i];
    if (i > 0) made.strides[i] = strides[i - 1];
    const bool valid = dims[i] >= 1 && dims[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256 &&
                       element_strides[i] == 1 && made.strides[i] < 1ull << 40 &&
                       (i == 0 || is_multiple(made.strides[i], 16));
    if (!valid) return CUDA_ERROR_INVALID_VALUE;
  }
  if (!is_multiple(made.row_bytes(), 16) || made.row_bytes() > span) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

// Where byte `offset` of a box or tile lies: 16-byte pieces are mixed within eight lines of 128
// bytes, by their absolute address.
inline std::uint32_t swizzle(std::uint32_t address, std::uint32_t bits) {
  return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4);
}

using BoxOrigin = std::array<int, 3>;

// Calls visit(shared address, pointer into the tensor, valid bytes) for each 16-byte piece.
template <typename Visit>
void for_each_piece(const TensorMap& map, std::uint32_t shared, const BoxOrigin& origin,
                    const Visit& visit) {
  const std::uint32_t pieces = map.row_bytes() / 16, elements = 16 / map.element_bytes;
  for (std::uint32_t row = 0; row < map.box[1] * map.box[2]; ++row) {
    const std::int64_t y = origin[1] + static_cast<std::int64_t>(row % map.box[1]);
    const std::int64_t z = origin[2] + static_cast<std::int64_t>(row / map.box[1]);
    const bool inside = y >= 0 && z >= 0 && y < static_cast<std::int64_t>(map.dims[1]) &&
                        z < static_cast<std::int64_t>(map.dims[2]);
    for (std::uint32_t piece = 0; piece < pieces; ++piece) {
      const std::int64_t x = origin[0] + static_cast<std::int64_t>(piece * elements);
      if (x < 0 && x % elements != 0) fail("a box begins within a piece before the tensor");
      const std::int64_t left = static_cast<std::int64_t>(map.dims[0]) - x;
      const std::int64_t valid =
          inside && x >= 0 && left > 0 ? (left < elements ? left : elements) : 0;
      const std::int64_t offset = y * static_cast<std::int64_t>(map.strides[1]) +
                                  z * static_cast<std::int64_t>(map.strides[2]) +
                                  x * map.element_bytes;
      visit(swizzle(shared + row * map.row_bytes() + piece * 16, map.swizzle_bits),
            valid > 0 ? map.data + offset : nullptr,
            static_cast<std::uint32_t>(valid) * map.element_bytes);
    }
  }
}

inline void check_alive(const Block& block, const char* what) {
  if (block.live_threads == 0) fail("%s a block that has ended", what);
}

// `mask` 0: into the caller's block alone; else into the same place of each block of the cluster
// whose bit is set. Until the box has come, its place is poison.
inline void tma_load(std::uint32_t shared, const CUtensorMap* encoded, std::uint32_t barrier,
                     std::uint32_t mask, const BoxOrigin& origin, std::uint32_t rank) {
  const TensorMap map = decode(encoded);
  if (map.rank != rank) fail("tma load: %u coordinates for a tensor of rank %u", rank, map.rank);
  Block& own = this_block();
  if (mask == 0) mask = 1u << own.rank;
  for (std::uint32_t left = mask; left != 0; left &= left - 1) {
    const auto to = static_cast<std::size_t>(std::countr_zero(left));
    if (to >= own.cluster->blocks.size()) fail("tma load: the cluster has no block %zu", to);
    Block& block = *own.cluster->blocks[to];
    check_alive(block, "tma load: into");
    std::memset(shared_bytes(block, shared, map.box_bytes(), 128, "tma load"), kPoison,
                map.box_bytes());
    scheduler->later([&block, map, shared, barrier, origin] {
      check_alive(block, "tma load: arrives in");
      for_each_piece(map, shared, origin,
                     [&](std::uint32_t place, const unsigned char* from, std::uint32_t valid) {
                       if (valid > 0) check_global(from, valid, map.element_bytes, "tma load");
                       unsigned char* const to = shared_bytes(block, place, 16, 16, "tma load");
                       std::memset(to, 0, 16);
                       if (valid > 0) std::memcpy(to, from, valid);
                     });
      mbarrier_deliver(block, barrier, map.box_bytes());
    });
  }
}

// A box on its way out: it is read from shared memory first and reaches device memory later.
struct StoredBox {
  Block& block;
  TensorMap map;
  std::uint32_t shared;
  BoxOrigin origin;
  bool read = false;
  std::vector<unsigned char> bytes = {};

  void read_shared() {
    if (read) return;
    check_alive(block, "tma store: reads");
    read = true;
    for_each_piece(map, shared, origin,
                   [&](std::uint32_t place, const unsigned char*, std::uint32_t) {
                     const unsigned char* from = shared_bytes(block, place, 16, 16, "tma store");
                     bytes.insert(bytes.end(), from, from + 16);
                   });
  }
  void write_global() {
    read_shared();
    std::size_t next = 0;
    for_each_piece(map, shared, origin, [&](std::uint32_t, unsigned char* to, std::uint32_t valid) {
      // A piece that begins inside the tensor is written whole, also past the tensor's end.
      if (valid > 0) {
        check_global(to, 16, 16, "tma store");
        std::memcpy(to, &bytes[next], 16);
      }
      next += 16;
    });
  }
};

inline void tma_store(const CUtensorMap* encoded, std::uint32_t shared, const BoxOrigin& origin) {
  const TensorMap map = decode(encoded);
  shared_bytes(shared, map.box_bytes(), 128, "tma store");
  const auto box = std::make_shared<StoredBox>(StoredBox{this_block(), map, shared, origin});
  this_thread().stores.push_back(box);
  scheduler->later([box] { box->write_global(); });
}

inline void tma_store_commit() {
  Thread& self = this_thread();
  self.committed_stores = self.stores.size();
}

inline void tma_store_wait_read() {
  Thread& self = this_thread();
  for (std::size_t i = 0; i < self.committed_stores; ++i) self.stores[i]->read_shared();
  self.stores.erase(self.stores.begin(),
                    self.stores.begin() + static_cast<std::ptrdiff_t>(self.committed_stores));
  self.committed_stores = 0;
}

}  // namespace dynabert::emulation

extern "C" __attribute__((weak)) cudaError_t
cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                 cudaDriverEntryPointQueryResult* result) {
  const bool known = std::string_view(symbol) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&dynabert::emulation::encode_tensor_map) : nullptr;
  if (result != nullptr) {
    *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}
