#include "cuda/quantize.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {
namespace {

template <class Kernel> unsigned grid_for(Kernel* kernel, int64_t numel, const char* name) {
  return grid_size(kernel, numel / kTile / kWarpsPerBlock + 1, name);
}

} // namespace

void quantize(const float* values, uint8_t* codes, float* scales, int64_t numel, bool is_signed, void* stream) {
  if (numel == 0) return;
  const auto kernel = is_signed ? quantize_kernel<true> : quantize_kernel<false>;
  launch("quantize", kernel, grid_for(kernel, numel, "quantize"), static_cast<cudaStream_t>(stream), values, codes,
         scales, numel);
}

void dequantize(const uint8_t* codes, const float* scales, float* values, int64_t numel, bool is_signed, void* stream) {
  if (numel == 0) return;
  const auto kernel = is_signed ? dequantize_kernel<true> : dequantize_kernel<false>;
  launch("dequantize", kernel, grid_for(kernel, numel, "dequantize"), static_cast<cudaStream_t>(stream), codes, scales,
         values, numel);
}

} // namespace zeroopt::cuda
