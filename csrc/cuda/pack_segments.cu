#include "cuda/pack_segments.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {

void pack_segments(const SegmentTable& segments, DType src_dtype, DType dst_dtype, double scale, int64_t total_numel,
                   void* workspace, void* stream) {
  constexpr const char* name = "pack_segments";
  if (segments.count == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto parts = workspace_at<PackPlan>(workspace, segments.count, total_numel);
  const unsigned grid = grid_size(max_tiles(segments.count, total_numel) / kWarpsPerBlock + 1, name);
  launch(name, prepare_pack_kernel, 1, queue, segments, src_dtype, dst_dtype, parts);
  if (src_dtype == DType::float64 || dst_dtype == DType::float64)
    launch(name, pack_segments_kernel<double>, grid, queue, segments, src_dtype, dst_dtype, scale, parts);
  else
    launch(name, pack_segments_kernel<float>, grid, queue, segments, src_dtype, dst_dtype, static_cast<float>(scale),
           parts);
}

} // namespace zeroopt::cuda
