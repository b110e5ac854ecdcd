// Grids, launches and their errors.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/vector.cuh"
#include "kernels.h"

namespace zeroopt::cuda {

inline void check(cudaError_t status, const char* kernel) {
  if (status == cudaSuccess) return;
  cudaGetLastError(); // or the caller's next CUDA call would report it again
  throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(status));
}

/// Blocks to launch of a kernel for `wanted` blocks of work: as many as can run at once, and they stride over the rest.
/// With more, the last ones would run while most of the device has nothing to do any more.
template <class... Params> unsigned grid_size(void (*kernel)(Params...), int64_t wanted, const char* name) {
  int device = 0;
  int multiprocessors = 0;
  int blocks = 0; // on each
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0), name);
  return static_cast<unsigned>(
      std::clamp<int64_t>(wanted, 1, static_cast<int64_t>(multiprocessors) * std::max(blocks, 1)));
}

/// Starts `grid` blocks of kThreads. A function of the runtime rather than <<<>>>, so that a plain C++ compiler can
/// read the launches too.
/// @throws std::runtime_error when CUDA refuses.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), unsigned grid, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

} // namespace zeroopt::cuda
