// What every optimizer's formula offers to the CPU and CUDA kernels, which are written once for all of them.
//
//   Group, Scalars         hyper-parameters, and what they come to for one segment; Scalars::num_states of this group
//   scalars(group, facts)  makes them, in float64
//   element<num_states>(s, p, g, state, update)   steps one element, in float32; `state` has at least num_states
//   kMinStates, kMaxStates groups use so many arrays of state, one number or the other
//   is_signed(k)           whether state k can be negative
//
// and, where an op differs from the usual, the constants of StepOp.
#pragma once

#include "common/host_device.h"
#include "kernels.h"

namespace zeroopt {

struct StepOp {
  static constexpr bool kReadsGrad = true;
  static constexpr bool kWritesStates = true;
  static constexpr bool kWritesParam = true;
  static constexpr bool kCountsStep = true;   ///< raises SegmentTable::steps
  static constexpr bool kSumsSquares = false; ///< of param and `update`, into SegmentTable::squares
  ZEROOPT_INLINE bool is_signed(int state) { return state == 0; }
};

/// What the scalars of a segment follow from, besides its group.
struct SegmentScalars {
  double step;           ///< the number of this step, counted from 1
  float grad_factor;     ///< clip_coef / grad_scale
  const double* squares; ///< the segment's row of SegmentTable::squares
};

/// a + weight * (b - a), computed from the nearer end as torch.lerp does, so that it is b when weight is 1.
ZEROOPT_INLINE float lerp(float a, float b, float one_minus_weight, float weight) {
  const float change = b - a;
  return weight < 0.5f ? a + weight * change : b - one_minus_weight * change;
}

} // namespace zeroopt
