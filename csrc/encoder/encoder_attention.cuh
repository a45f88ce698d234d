// Attention in the persistent encoder.

#pragma once

#include "../cuda/grid_barrier.cuh"
#include "../cuda/mma.cuh"
#include "encoder_parameters.cuh"

namespace dynabert::encoder {

// The loaders' part of a phase of its own; the first warpgroup has none. An item is one head and
// one tile of query rows. The warps of a query group share the keys in turns of 16, each with its
// own running maximum and sum, and are combined in their order.
template <int kHeadDim>
__device__ __forceinline__ void attend(const Parameters& p, int num_heads, const QueryTile* tiles,
                                       int num_tiles, unsigned char* shared) {
  constexpr int kPieces = kHeadDim / 8;  // 16-byte pieces of a row
  constexpr int kStride = kHeadDim + 8;  // floats between rows of partial outputs
  // Bytes of a warp: two tiles of values, then its output.
  constexpr int kRegion = 16 * kStride * 4;
  constexpr int kValueTile = 16 * kHeadDim * 2;
  const int groups = query_groups(p.tokens);
  const int warps = kLoaderWarps / groups;  // that share a group's keys
  const int loader = threadIdx.x - kMmaThreads;
  const int warp = loader / 32, lane = loader % 32;
  const int group = warp / warps, turn = warp % warps;
  const int g = lane / 4, t = lane % 4;
  const int row_stride = 3 * num_heads * kHeadDim;
  const float scale = 1.4426950408889634f * rsqrtf(static_cast<float>(kHeadDim));
  float* outputs = reinterpret_cast<float*>(shared);
  float2* extremes = reinterpret_cast<float2*>(shared + kLoaderWarps * kRegion);
  const std::uint32_t values = shared_address(shared) + warp * kRegion;

  for (int item = blockIdx.x; item < num_heads * num_tiles; item += gridDim.x) {
    const int head = item % num_heads;
    const QueryTile tile = tiles[item / num_heads];
    const bf16* qkv = p.workspace.qkv + static_cast<std::size_t>(head) * 3 * kHeadDim;
    auto row_pieces = [&](int row, int part) {
      const int source = min(row, tile.end - 1);
      return reinterpret_cast<const uint4*>(qkv + static_cast<std::size_t>(source) * row_stride +
                                            part * kHeadDim);
    };
    auto copy_values = [&](int key, int buffer) {
#pragma unroll 2
      for (int i = lane; i < 16 * kPieces; i += 32) {
        const int row = i / kPieces, piece = i % kPieces;
        const int swizzled = piece ^ (kPieces >= 8 ? row & 7 : row / 2 & 3);
        copy_async_16(values + buffer * kValueTile + row * kHeadDim * 2 + swizzled * 16,
                      row_pieces(key + row, 2) + piece);
      }
      copy_async_commit();
    };

    // Lane t of a row holds 8 neighbouring dimensions, not the pairs that the instruction's layout
    // names: sums do not mind the order, as long as queries and keys agree.
    uint4 query[2][kHeadDim / 32];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kHeadDim / 32; ++j) {
        query[i][j] = load_coherent(row_pieces(tile.row + group * 16 + g + 8 * i, 0) + j * 4 + t);
      }
    }
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    float out[kHeadDim / 8][4];
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.0f;

    int buffer = 0;
    const int first_key = tile.begin + turn * 16;
    if (first_key < tile.end) copy_values(first_key, 0);
    for (int key = first_key; key < tile.end; key += 16 * warps) {
      const bool more = key + 16 * warps < tile.end;
      if (more) copy_values(key + 16 * warps, buffer ^ 1);

      float s[2][4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint4 keys[kHeadDim / 32];
#pragma unroll
        for (int j = 0; j < kHeadDim / 32; ++j) {
          keys[j] = load_coherent(row_pieces(key + g + 8 * i, 1) + j * 4 + t);
        }
#pragma unroll
        for (int j = 0; j < kHeadDim / 32; ++j) {
          mma_m16n8k16(s[i], query[0][j].x, query[1][j].x, query[0][j].y, query[1][j].y, keys[j].x,
                       keys[j].y);
          mma_m16n8k16(s[i], query[0][j].z, query[1][j].z, query[0][j].w, query[1][j].w, keys[j].z,
                       keys[j].w);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool valid = key + 8 * i + 2 * t + (j & 1) < tile.end;
          s[i][j] = valid ? s[i][j] * scale : -INFINITY;
        }
      }
      // The first key of these 16 is valid, so no maximum stays infinite.
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float m = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
        m = fmaxf(m, maximum[r]);
        const float shrink = exp2_approx(maximum[r] - m);
        maximum[r] = m;
        sum[r] *= shrink;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          out[j][2 * r] *= shrink;
          out[j][2 * r + 1] *= shrink;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          s[i][2 * r] = exp2_approx(s[i][2 * r] - m);
          s[i][2 * r + 1] = exp2_approx(s[i][2 * r + 1] - m);
          sum[r] += s[i][2 * r] + s[i][2 * r + 1];
        }
      }
      if (more) {
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      __syncwarp();
      const std::uint32_t a0 = pack_bf16(s[0][0], s[0][1]), a1 = pack_bf16(s[0][2], s[0][3]);
      const std::uint32_t a2 = pack_bf16(s[1][0], s[1][1]), a3 = pack_bf16(s[1][2], s[1][3]);
#pragma unroll
      for (int j = 0; j < kHeadDim / 16; ++j) {
        const int row = lane % 16, piece = 2 * j + lane / 16;
        const int swizzled = piece ^ (kPieces >= 8 ? row & 7 : row / 2 & 3);
        std::uint32_t v[4];
        load_matrix_transposed_x4(
            v, values + buffer * kValueTile + row * kHeadDim * 2 + swizzled * 16);
        mma_m16n8k16(out[2 * j], a0, a1, a2, a3, v[0], v[1]);
        mma_m16n8k16(out[2 * j + 1], a0, a1, a2, a3, v[2], v[3]);
      }
      __syncwarp();  // the tile is read before the next copy into it
      buffer ^= 1;
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
      if (t == 0) extremes[warp * 16 + g + 8 * r] = make_float2(maximum[r], sum[r]);
      float* row = outputs + warp * 16 * kStride + (g + 8 * r) * kStride + 2 * t;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(row + 8 * j) = make_float2(out[j][2 * r], out[j][2 * r + 1]);
      }
    }
    named_barrier_sync(kLoadersMeet, kLoaders);

    for (int i = loader; i < groups * 16 * (kHeadDim / 4); i += kLoaders) {
      const int row = i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4;
      if (tile.row + row >= tile.end) continue;
      const int first = row / 16 * warps * 16 + row % 16;  // this row at the group's first warp
      // All reads at once: a loop of `warps` turns would wait for each.
      float2 extreme[kLoaderWarps];
      float4 part[kLoaderWarps];
      float top = -INFINITY;
#pragma unroll
      for (int w = 0; w < kLoaderWarps; ++w) {
        extreme[w] = make_float2(-INFINITY, 0.0f);
        part[w] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (w < warps) {
          extreme[w] = extremes[first + w * 16];
          part[w] = *reinterpret_cast<const float4*>(outputs + (first + w * 16) * kStride + column);
        }
        top = fmaxf(top, extreme[w].x);
      }
      float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      float total_sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kLoaderWarps; ++w) {
        const float factor = exp2_approx(extreme[w].x - top);  // 0 for a warp that had no key
        total.x += factor * part[w].x;
        total.y += factor * part[w].y;
        total.z += factor * part[w].z;
        total.w += factor * part[w].w;
        total_sum += factor * extreme[w].y;
      }
      const float inverse = 1.0f / total_sum;
      *reinterpret_cast<uint2*>(
          p.workspace.context + static_cast<std::size_t>(tile.row + row) * num_heads * kHeadDim +
          head * kHeadDim + column) = make_uint2(pack_bf16(total.x * inverse, total.y * inverse),
                                                 pack_bf16(total.z * inverse, total.w * inverse));
    }
    named_barrier_sync(kLoadersMeet, kLoaders);
  }
}

}  // namespace dynabert::encoder
