#include "cuda/quantize.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {
namespace {

unsigned grid_for(int64_t numel, const char* kernel) {
  return grid_size(numel / kTile / kWarpsPerBlock + 1, kernel);
}

} // namespace

void quantize(const float* values, uint8_t* codes, float* scales, int64_t numel, bool is_signed, void* stream) {
  if (numel == 0) return;
  const auto kernel = is_signed ? quantize_kernel<true> : quantize_kernel<false>;
  launch("quantize", kernel, grid_for(numel, "quantize"), static_cast<cudaStream_t>(stream), values, codes, scales,
         numel);
}

void dequantize(const uint8_t* codes, const float* scales, float* values, int64_t numel, bool is_signed, void* stream) {
  if (numel == 0) return;
  const auto kernel = is_signed ? dequantize_kernel<true> : dequantize_kernel<false>;
  launch("dequantize", kernel, grid_for(numel, "dequantize"), static_cast<cudaStream_t>(stream), codes, scales, values,
         numel);
}

} // namespace zeroopt::cuda
