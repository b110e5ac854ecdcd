// The step of every optimizer over float32 arrays: one loop for all, around the formulas of csrc/ops.
#include "cpu/leaf/table.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

template <class Op, int num_states>
void step(const typename Op::Scalars& scalars, float* param, const float* grad, float* const* states, float* update,
          int64_t numel) {
  constexpr int size = num_states > 0 ? num_states : 1;
  const typename Op::Scalars s = scalars; // copies that no store can change
  float* state[size];
  for (int k = 0; k < num_states; ++k)
    state[k] = states[k];
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i) {
    // Local copies: through references the compiler would store some twice.
    float p = param[i], u = 0.0f;
    float local[size] = {};
    for (int k = 0; k < num_states; ++k)
      local[k] = state[k][i];
    Op::template element<num_states>(s, p, Op::kReadsGrad ? grad[i] : 0.0f, local, u);
    if (Op::kWritesParam) param[i] = p;
    if (Op::kWritesStates)
      for (int k = 0; k < num_states; ++k)
        state[k][i] = local[k];
    if (Op::kSumsSquares) update[i] = u;
  }
}

} // namespace

const StepTable step_table = {
    {{step<AdamW, 2>, step<AdamW, 3>}}, {{step<Sgd, 0>, step<Sgd, 1>}}, {{step<Adagrad, 1>}}, {{step<Lion, 1>}},
    {{step<LambMoments, 2>}},           {{step<LambUpdate, 2>}},
};

} // namespace zeroopt::cpu::ZEROOPT_ISA
