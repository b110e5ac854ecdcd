#include "cuda/pack.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {
namespace {

template <class Src, class Dst>
void launch_pair(const void* src, void* dst, int64_t numel, double scale, cudaStream_t stream) {
  constexpr int N = PackShape<Src, Dst>::vector_numel;
  const auto kernel = pack_kernel<Src, Dst>;
  const int64_t blocks = num_vectors(numel, N, N) / kThreads + 1;
  launch("pack", kernel, grid_size(kernel, blocks, "pack"), stream, static_cast<const Src*>(src),
         static_cast<Dst*>(dst), numel, static_cast<typename Compute<Src, Dst>::type>(scale));
}

template <class Src>
void launch_from(const void* src, void* dst, DType dst_dtype, int64_t numel, double scale, cudaStream_t stream) {
  switch (dst_dtype) {
  case DType::float32:
    return launch_pair<Src, float>(src, dst, numel, scale, stream);
  case DType::float64:
    return launch_pair<Src, double>(src, dst, numel, scale, stream);
  case DType::bfloat16:
    return launch_pair<Src, BFloat16>(src, dst, numel, scale, stream);
  case DType::float16:
    return launch_pair<Src, Float16>(src, dst, numel, scale, stream);
  }
}

} // namespace

void pack(const void* src, DType src_dtype, void* dst, DType dst_dtype, int64_t numel, double scale, void* stream) {
  if (numel == 0 || (src == dst && src_dtype == dst_dtype && scale == 1.0)) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (src_dtype) {
  case DType::float32:
    return launch_from<float>(src, dst, dst_dtype, numel, scale, queue);
  case DType::float64:
    return launch_from<double>(src, dst, dst_dtype, numel, scale, queue);
  case DType::bfloat16:
    return launch_from<BFloat16>(src, dst, dst_dtype, numel, scale, queue);
  case DType::float16:
    return launch_from<Float16>(src, dst, dst_dtype, numel, scale, queue);
  }
}

} // namespace zeroopt::cuda
