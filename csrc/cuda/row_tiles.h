// The table of row tiles of a batch of mixed widths (row_tile_schedule.h), built on the device:
// widths and offsets are never read back.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "row_tile_schedule.h"

namespace dynabert {

// Fills table[0 .. max_row_tiles(tokens, batch, tile_rows)); entries that no run needs are {0, 0,
// 0}, and come last. Widths are clamped to 0..limit, offsets to 0..tokens.
cudaError_t build_row_tiles(const std::int32_t* cu_seqlens,  // [batch + 1]
                            std::int32_t batch,
                            const std::int32_t* each,  // [batch]
                            std::int32_t tokens, std::int32_t limit, std::int32_t tile_rows,
                            RowTile* table, cudaStream_t stream);

}  // namespace dynabert
