#include "cuda/launch.h"
#include "cuda/step.cuh"
#include "ops/adagrad.h"
#include "ops/adamw.h"
#include "ops/lamb.h"
#include "ops/lion.h"
#include "ops/sgd.h"

namespace zeroopt::cuda {
namespace {

template <class Op>
void step(const char* name, const SegmentTable& segments, const Storage& storage, const typename Op::Group* groups,
          const StepControl& control, int64_t total_numel, void* workspace, void* stream) {
  static_assert(Op::kMaxStates - Op::kMinStates <= 1, "the kernel is compiled for these two numbers");
  if (segments.count == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto parts = workspace_at<StepPlan<Op>>(workspace, segments.count, total_numel);
  const unsigned grid = grid_size(max_tiles(segments.count, total_numel) / kWarpsPerBlock + 1, name);
  launch(name, prepare_step_kernel<Op>, 1, queue, segments, storage, groups, control, parts);
  launch(name, step_kernel<Op>, grid, queue, segments, storage, control, parts);
  if constexpr (Op::kSumsSquares)
    launch(name, step_sums_kernel<Op>, grid_size(segments.count, name), queue, segments, parts);
}

} // namespace

int64_t workspace_bytes(int64_t num_segments, int64_t total_numel) {
  return WorkspaceLayout::of(num_segments, max_tiles(num_segments, total_numel)).end;
}

void adamw(const SegmentTable& segments, const Storage& storage, const AdamWGroup* groups, const StepControl& control,
           int64_t total_numel, void* workspace, void* stream) {
  step<AdamW>("adamw", segments, storage, groups, control, total_numel, workspace, stream);
}

void sgd(const SegmentTable& segments, const Storage& storage, const SgdGroup* groups, const StepControl& control,
         int64_t total_numel, void* workspace, void* stream) {
  step<Sgd>("sgd", segments, storage, groups, control, total_numel, workspace, stream);
}

void adagrad(const SegmentTable& segments, const Storage& storage, const AdagradGroup* groups,
             const StepControl& control, int64_t total_numel, void* workspace, void* stream) {
  step<Adagrad>("adagrad", segments, storage, groups, control, total_numel, workspace, stream);
}

void lion(const SegmentTable& segments, const Storage& storage, const LionGroup* groups, const StepControl& control,
          int64_t total_numel, void* workspace, void* stream) {
  step<Lion>("lion", segments, storage, groups, control, total_numel, workspace, stream);
}

void lamb_moments(const SegmentTable& segments, const Storage& storage, const LambGroup* groups,
                  const StepControl& control, int64_t total_numel, void* workspace, void* stream) {
  step<LambMoments>("lamb_moments", segments, storage, groups, control, total_numel, workspace, stream);
}

void lamb_update(const SegmentTable& segments, const Storage& storage, const LambGroup* groups,
                 const StepControl& control, int64_t total_numel, void* workspace, void* stream) {
  step<LambUpdate>("lamb_update", segments, storage, groups, control, total_numel, workspace, stream);
}

} // namespace zeroopt::cuda
