// The step of every optimizer over float32 arrays: one loop for all, around the formulas of csrc/ops.
#include "cpu/leaf/table.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

template <class Op, unsigned states>
void step(const typename Op::Scalars& scalars, float* param, const float* grad, float* const* state_arrays,
          float* update, int64_t numel) {
  constexpr int size = kNumStates<Op>;
  const typename Op::Scalars s = scalars; // copies that no store can change
  float* state[size];
  for (int k = 0; k < size; ++k)
    state[k] = state_arrays[k];
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i) {
    // Local copies: through references the compiler would store some twice.
    float p = param[i], u = 0.0f;
    float local[size] = {};
    for (int k = 0; k < size; ++k)
      if (states >> k & 1u) local[k] = state[k][i];
    Op::template element<states>(s, p, Op::kReadsGrad ? grad[i] : 0.0f, local, u);
    if (Op::kWritesParam) param[i] = p;
    for (int k = 0; k < size; ++k)
      if (Op::kWritesStates && (states >> k & 1u)) state[k][i] = local[k];
    if (Op::kSumsSquares) update[i] = u;
  }
}

template <class Op, unsigned states> constexpr StepLeaf<Op> leaf() {
  constexpr bool may_occur = (states | kOptionalStates<Op>) == kAllStates<Op>;
  if constexpr (may_occur)
    return step<Op, states>;
  else
    return nullptr;
}

template <class Op> constexpr OpLeaves<Op> leaves() {
  static_assert(kMaxStates == 3, "every set of so many states is listed");
  return {{leaf<Op, 0>(), leaf<Op, 1>(), leaf<Op, 2>(), leaf<Op, 3>(), leaf<Op, 4>(), leaf<Op, 5>(), leaf<Op, 6>(),
           leaf<Op, 7>()}};
}

template <class... Ops> constexpr StepTable make_table(OpList<Ops...>) {
  return {leaves<Ops>()...};
}

} // namespace

constexpr StepTable step_table = make_table(AllOps{});

} // namespace zeroopt::cpu::ZEROOPT_ISA
