#include "cpu/isa.h"
#include "cpu/segment_work.h"

namespace zeroopt::cpu {

void sgd(const SgdTensors& tensors, const SegmentTable& segments, const SgdGroup* groups, int num_threads) {
  const SegmentWork<SgdScalars> work(segments,
                                     [&](int64_t group, float step) { return sgd_scalars(groups[group], step); });
  const SgdLeaf leaf = isa().leaves->sgd;
  work.run(num_threads, [&](int64_t offset, int64_t numel, const SgdScalars& scalars) {
    leaf({tensors.param + offset, tensors.grad + offset,
          scalars.momentum != 0 ? tensors.momentum_buffer + offset : nullptr},
         numel, scalars);
  });
}

} // namespace zeroopt::cpu
