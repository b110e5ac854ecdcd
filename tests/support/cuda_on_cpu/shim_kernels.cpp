// Small kernels that show whether grid.cpp does what CUDA does: the test of the test.
#include "cuda_runtime.h"

#include <exception>
#include <string>

namespace {

constexpr unsigned kThreads = 64;
constexpr unsigned kAllLanes = 0xffffffffu;

std::string error;

/// out[block * kThreads + thread] = the sum over the block of in, by way of shared memory.
void sum_kernel(const int64_t* in, int64_t* out) {
  __shared__ int64_t shared[kThreads];
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  shared[threadIdx.x] = in[i];
  __syncthreads();
  int64_t sum = 0;
  for (int64_t value : shared)
    sum += value;
  __syncthreads();
  out[i] = sum;
}

void shuffle_kernel(const int64_t* in, int64_t* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t once = __shfl_xor_sync(kAllLanes, in[i], 1);
  out[i] = __shfl_xor_sync(kAllLanes, once, 16);
}

void missed_barrier_kernel(const int64_t*, int64_t*) {
  if (threadIdx.x != 40) __syncthreads();
}

void two_barriers_kernel(const int64_t*, int64_t*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

void missed_shuffle_kernel(const int64_t* in, int64_t* out) {
  if (threadIdx.x != 40) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, in[threadIdx.x], 1);
}

void narrow_mask_kernel(const int64_t* in, int64_t* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, in[threadIdx.x], 16);
}

struct alignas(16) Pair {
  int64_t items[2];
};

void misaligned_kernel(const int64_t* in, int64_t* out) {
  *reinterpret_cast<Pair*>(out) = *reinterpret_cast<const Pair*>(in + 1);
}

using Kernel = void (*)(const int64_t*, int64_t*);
constexpr Kernel kKernels[] = {sum_kernel,          shuffle_kernel,        missed_barrier_kernel,
                               two_barriers_kernel, missed_shuffle_kernel, narrow_mask_kernel,
                               misaligned_kernel};

} // namespace

extern "C" {

/// Runs a kernel on two blocks of 64 threads, and returns what went wrong, or nothing.
const char* run_shim_kernel(int kernel, const int64_t* in, int64_t* out, bool reverse_order) {
  cuda_on_cpu::reverse_order = reverse_order;
  error.clear();
  try {
    cuda_on_cpu::run_grid(2, kThreads, [&] { kKernels[kernel](in, out); });
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}

} // extern "C"
