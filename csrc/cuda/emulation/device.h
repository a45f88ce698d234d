// The emulated device, as kernels see it.
//
//   grid.h, fiber.h            threads as fibers, in an order drawn by chance
//   meet.h, warp.h             barriers and shuffles; products and matrices of a warp
//   shared.h, memory.h         shared and device memory with their bounds; copies of a thread
//   mbarrier.h, tensor_map.h   counting barriers and the copy engine of Hopper
//   wgmma.h                    products of a warpgroup
//   launch.h, runtime.h        launches, and the CUDA runtime that launchers use
//
// Seen: a barrier or wait that is missing (for some order of the threads), lanes that diverge,
// deadlocks, bytes used before they came or after their place was given away, and accesses out of
// bounds or misaligned where a function of csrc/cuda makes them. Stores through plain pointers past
// an allocation are seen when it is freed.
//
// Not seen: a fence that is missing (memory has one order here), plain accesses that are misaligned
// or read past the end of an allocation, unless the poison there shows, and what the card counts:
// registers, bank conflicts, time. Products are summed in float, in another order than the card's.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <vector_functions.h>

#include "builtins.h"
#include "grid.h"
#include "meet.h"
#include "memory.h"
#include "runtime.h"
#include "shared.h"
#include "warp.h"
