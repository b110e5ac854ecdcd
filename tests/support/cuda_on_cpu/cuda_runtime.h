// What of CUDA the kernels and their launches use, for a plain C++ compiler: the sources of csrc/cuda are compiled
// against this header instead of NVIDIA's, and run on the CPU.
//
// The blocks of a grid run one after the other. The threads of a block take turns: one runs until it waits, at a
// barrier or a shuffle, for others. So there are no races to be seen here, but what a thread finds in shared memory
// does depend on the barriers, and on the order of the threads, which a test can reverse.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static // one block runs at a time

#define __isGlobal(address) true
#define __builtin_assume(condition)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

/// Runs a kernel.
/// @throws std::logic_error when threads wait for others that never come.
void run_grid(unsigned num_blocks, unsigned num_threads, const std::function<void()>& kernel);

/// Waits for all threads of the block. `line` is where in the source; all must wait at the same one.
void barrier(int line);

/// Waits for all lanes of the mask, and returns what the lane `source` gave.
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, int line);

/// What cudaDevAttrMultiProcessorCount gives, by which grids are sized.
inline int num_multiprocessors = 1;

/// What cudaDevAttrSingleToDoublePrecisionPerfRatio gives: how much faster float32 is than float64.
inline int float64_ratio = 2;

/// Threads and blocks run from the last to the first.
inline bool reverse_order = false;

template <class T> T shuffle_value(unsigned mask, T value, unsigned source, int line) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof bits);
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

} // namespace cuda_on_cpu

inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_on_cpu::barrier(line);
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle_value(mask, value, (threadIdx.x ^ static_cast<unsigned>(lane_mask)) % 32, line);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrSingleToDoublePrecisionPerfRatio };

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::num_multiprocessors : cuda_on_cpu::float64_ratio;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12040;
  return cudaSuccess;
}

template <class Kernel> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 3;
  return cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  cuda_on_cpu::run_grid(config->gridDim.x, config->blockDim.x, [&] { kernel(args...); });
  return cudaSuccess;
}
