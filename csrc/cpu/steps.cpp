#include "cpu/step.h"
#include "ops/by_name.h"

namespace zeroopt::cpu {

void step(const std::string& kernel, const SegmentTable& segments, const Storage& storage, const double* groups,
          const StepControl& control, int num_threads) {
  with_op(kernel, [&](auto op) {
    using Op = decltype(op);
    const OpLeaves<Op>& leaves = *isa().leaves->steps;
    step<Op>(segments, storage, reinterpret_cast<const typename Op::Group*>(groups), control, leaves, num_threads);
  });
}

} // namespace zeroopt::cpu
