// What a launch is made of, on a card or emulated.

#pragma once

#include <vector_types.h>

#include <cstddef>

namespace dynabert {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
  unsigned cluster = 1;      // neighbouring blocks (along x) that share their shared memory
  bool cooperative = false;  // all blocks are resident, so that they may wait for each other
  // Blocks may start, up to wait_for_previous_kernel(), before the stream's previous kernel ends.
  bool programmatic = false;
};

}  // namespace dynabert
