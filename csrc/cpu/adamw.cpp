#include "cpu/isa.h"
#include "cpu/segment_work.h"

namespace zeroopt::cpu {

void adamw(const AdamWTensors& tensors, const SegmentTable& segments, const AdamWGroup* groups, int num_threads) {
  const SegmentWork<AdamWScalars> work(segments,
                                       [&](int64_t group, float step) { return adamw_scalars(groups[group], step); });
  const AdamWLeaf leaf = isa().leaves->adamw;
  work.run(num_threads, [&](int64_t offset, int64_t numel, const AdamWScalars& scalars) {
    leaf({tensors.param + offset, tensors.grad + offset, tensors.exp_avg + offset, tensors.exp_avg_sq + offset,
          scalars.amsgrad != 0 ? tensors.max_exp_avg_sq + offset : nullptr},
         numel, scalars);
  });
}

} // namespace zeroopt::cpu
