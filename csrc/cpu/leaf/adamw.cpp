// adamw: one step over a range. bytes: 28 an element, 36 with AMSGrad.
#include "cpu/leaf/table.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

template <bool amsgrad> void step(const AdamWTensors& tensors, int64_t numel, const AdamWScalars& scalars) {
  float* param = tensors.param;
  const float* grad = tensors.grad;
  float* exp_avg = tensors.exp_avg;
  float* exp_avg_sq = tensors.exp_avg_sq;
  float* max_exp_avg_sq = tensors.max_exp_avg_sq;
  const AdamWScalars s = scalars; // a copy no store can change
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i) {
    // Local copies: through references the compiler would store param twice.
    float p = param[i], m = exp_avg[i], v = exp_avg_sq[i];
    float v_max = amsgrad ? max_exp_avg_sq[i] : 0.0f;
    adamw_element(s, p, grad[i], m, v, amsgrad ? &v_max : nullptr);
    param[i] = p;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (amsgrad) max_exp_avg_sq[i] = v_max;
  }
}

} // namespace

void adamw(const AdamWTensors& tensors, int64_t numel, const AdamWScalars& scalars) {
  tensors.max_exp_avg_sq == nullptr ? step<false>(tensors, numel, scalars) : step<true>(tensors, numel, scalars);
}

} // namespace zeroopt::cpu::ZEROOPT_ISA
