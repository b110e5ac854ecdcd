// Grids and errors of kernel launches.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace zeroopt::cuda {

inline void check(cudaError_t status, const char* kernel) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(status));
}

/// Blocks to launch for `wanted` blocks of work: as many as can run at once, and they stride over the rest.
inline unsigned grid_size(int64_t wanted, const char* kernel) {
  constexpr int64_t kBlocksPerMultiprocessor = 8; // of 256 threads: 2048 threads, all that one can hold
  int device = 0;
  int multiprocessors = 0;
  check(cudaGetDevice(&device), kernel);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), kernel);
  return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, multiprocessors * kBlocksPerMultiprocessor));
}

} // namespace zeroopt::cuda
