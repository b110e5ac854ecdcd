// What an optimizer's formula says of itself: all that the CPU and CUDA kernels, written once for every optimizer, and
// Python know of it.
//
//   kName                 of the optimizer, for Python
//   ZEROOPT_COLUMNS(...)  its hyper-parameters: makes Group, Column and kColumns
//   kStates               its arrays of state, at most kMaxStates
//   Scalars               what the hyper-parameters come to for one segment
//   scalars(group, facts) makes them, in float64
//   element<states>(s, p, g, state, update)   steps one element, in float32; bit k of `states` is set where the group
//                         uses state k, and no other element of `state` means anything
//
// and, where an op differs from the usual, the constants of StepOp.
#pragma once

#include "common/host_device.h"
#include "kernels.h"

namespace zeroopt {

struct StepOp {
  static constexpr const char* kPass = nullptr; ///< of an optimizer that takes several kernels, one after the other
  static constexpr bool kReadsGrad = true;
  static constexpr bool kWritesStates = true;
  static constexpr bool kWritesParam = true;
  static constexpr bool kCountsStep = true;   ///< raises SegmentTable::steps
  static constexpr bool kSumsSquares = false; ///< of param and `update`, into SegmentTable::squares
};

/// Group: the hyper-parameters of one param_group, a row of a table float64[num_groups][columns]; flags are 0 or 1.
/// Column: the numbers of its columns. kColumns: their names, separated by ", ".
#define ZEROOPT_COLUMNS(...)                                                                                           \
  struct Group {                                                                                                       \
    double __VA_ARGS__;                                                                                                \
  };                                                                                                                   \
  struct Column {                                                                                                      \
    enum : int { __VA_ARGS__ };                                                                                        \
  };                                                                                                                   \
  static constexpr const char* kColumns = #__VA_ARGS__

constexpr bool kSigned = true;
constexpr bool kUnsigned = false;
constexpr int kAlways = -1;

/// One array of state.
struct State {
  const char* name; ///< that torch has for it
  bool is_signed;   ///< whether it can be negative
  int column;       ///< a group uses it where this hyper-parameter is not 0; kAlways: every group does
};

template <class Op> constexpr int kNumStates = sizeof(Op::kStates) / sizeof(State);

template <class Op> constexpr unsigned signed_states() {
  unsigned bits = 0;
  for (int k = 0; k < kNumStates<Op>; ++k)
    bits |= (Op::kStates[k].is_signed ? 1u : 0u) << k;
  return bits;
}

template <class Op> constexpr unsigned optional_states() {
  unsigned bits = 0;
  for (int k = 0; k < kNumStates<Op>; ++k)
    bits |= (Op::kStates[k].column != kAlways ? 1u : 0u) << k;
  return bits;
}

// As constants, for device code cannot read arrays of the host: bit k is set where state k can be negative, where a
// group may do without it, and where there is one.
template <class Op> constexpr unsigned kSignedStates = signed_states<Op>();
template <class Op> constexpr unsigned kOptionalStates = optional_states<Op>();
template <class Op> constexpr unsigned kAllStates = (1u << kNumStates<Op>)-1;

template <class Op, int k> ZEROOPT_INLINE unsigned state_in_use(const double* columns) {
  if constexpr (k < kNumStates<Op>) {
    constexpr int column = Op::kStates[k].column;
    if constexpr (column == kAlways)
      return 1u << k;
    else
      return columns[column] != 0.0 ? 1u << k : 0u;
  } else {
    return 0u;
  }
}

/// Bit k is set where the group uses state k.
template <class Op> ZEROOPT_INLINE unsigned states_in_use(const typename Op::Group& group) {
  static_assert(kMaxStates == 3, "each is asked for");
  const double* const columns = reinterpret_cast<const double*>(&group);
  return state_in_use<Op, 0>(columns) | state_in_use<Op, 1>(columns) | state_in_use<Op, 2>(columns);
}

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
