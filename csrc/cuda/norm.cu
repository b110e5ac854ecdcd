#include "cuda/norm.cuh"

#include "cuda/launch.h"

namespace zeroopt::cuda {
namespace {

template <DType grad>
void launch_for(const SegmentTable& segments, float* found_inf, int64_t total_numel, void* workspace,
                cudaStream_t stream) {
  constexpr const char* name = "squared_norms";
  const auto parts = workspace_at<NormPlan>(workspace, segments.count, total_numel);
  const int64_t blocks = max_tiles(segments.count, total_numel) / kWarpsPerBlock + 1;
  launch(name, prepare_norm_kernel<grad>, num_plan_blocks(segments.count), stream, segments, parts);
  launch(name, norm_kernel<grad>, grid_size(norm_kernel<grad>, blocks, name), stream, segments, parts);
  launch(name, norm_sums_kernel, grid_size(norm_sums_kernel, segments.count, name), stream, segments, found_inf, parts);
}

} // namespace

void squared_norms(const SegmentTable& segments, DType grad, float* found_inf, int64_t total_numel, void* workspace,
                   void* stream) {
  if (segments.count == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (grad) {
  case DType::float32:
    return launch_for<DType::float32>(segments, found_inf, total_numel, workspace, queue);
  case DType::bfloat16:
    return launch_for<DType::bfloat16>(segments, found_inf, total_numel, workspace, queue);
  case DType::float16:
    return launch_for<DType::float16>(segments, found_inf, total_numel, workspace, queue);
  case DType::float64:
    throw std::invalid_argument("squared_norms: there is no kernel for float64");
  }
}

} // namespace zeroopt::cuda
