// The emulated device, as kernels see it.

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
