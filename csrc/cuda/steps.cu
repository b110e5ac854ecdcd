#include "cuda/launch.h"
#include "cuda/step.cuh"
#include "ops/by_name.h"

namespace zeroopt::cuda {
namespace {

template <class Op>
void step(const char* name, const SegmentTable& segments, const Storage& storage, const typename Op::Group* groups,
          const StepControl& control, int64_t total_numel, void* workspace, void* stream) {
  if (segments.count == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto parts = workspace_at<StepPlan<Op>>(workspace, segments.count, total_numel);
  launch(name, prepare_step_kernel<Op>, num_plan_blocks(segments.count), queue, segments, storage, groups, control,
         parts);
  with_formats(storage, [&](auto formats) {
    const auto kernel = step_kernel<Op, decltype(formats)>;
    const int64_t blocks = max_strips<StepPlan<Op>>(segments.count, total_numel) / kWarpsPerBlock + 1;
    launch(name, kernel, grid_size(kernel, blocks, name), queue, segments, formats, storage.grad, control, parts);
  });
  if constexpr (Op::kSumsSquares)
    launch(name, step_sums_kernel<Op>, grid_size(step_sums_kernel<Op>, segments.count, name), queue, segments, parts);
}

} // namespace

int64_t step_workspace_bytes(const std::string& kernel, int64_t num_segments, int64_t total_numel) {
  int64_t bytes = 0;
  with_op(kernel, [&](auto op) { bytes = WorkspaceLayout::of<StepPlan<decltype(op)>>(num_segments, total_numel).end; });
  return bytes;
}

void step(const std::string& kernel, const SegmentTable& segments, const Storage& storage, const double* groups,
          const StepControl& control, int64_t total_numel, void* workspace, void* stream) {
  with_op(kernel, [&](auto op) {
    using Op = decltype(op);
    step<Op>(kernel.c_str(), segments, storage, reinterpret_cast<const typename Op::Group*>(groups), control,
             total_numel, workspace, stream);
  });
}

} // namespace zeroopt::cuda
