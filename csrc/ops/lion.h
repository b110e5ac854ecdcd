// One element of Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2).
//
//   p <- p * (1 - lr * weight_decay)
//   p <- p - lr * sign(beta1 * m + (1 - beta1) * g)
//   m <- beta2 * m + (1 - beta2) * g
#pragma once

#include "ops/op.h"

namespace zeroopt {

struct Lion : StepOp {
  static constexpr const char* kName = "lion";
  ZEROOPT_COLUMNS(lr, beta1, beta2, weight_decay, maximize);
  static constexpr State kStates[] = {{"exp_avg", kSigned, kAlways}};

  struct Scalars {
    float grad_factor;
    float param_decay; ///< 1 - lr * weight_decay
    float lr;
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
  };

  ZEROOPT_INLINE Scalars scalars(const Group& group, const SegmentScalars& segment) {
    Scalars s;
    s.grad_factor = group.maximize != 0 ? -segment.grad_factor : segment.grad_factor;
    s.param_decay = static_cast<float>(1.0 - group.lr * group.weight_decay);
    s.lr = static_cast<float>(group.lr);
    s.beta1 = static_cast<float>(group.beta1);
    s.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
    s.beta2 = static_cast<float>(group.beta2);
    s.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
    return s;
  }

  template <unsigned, int size>
  ZEROOPT_INLINE void element(const Scalars& s, float& p, float g, float (&state)[size], float&) {
    g *= s.grad_factor;
    const float direction = s.beta1 * state[0] + s.one_minus_beta1 * g;
    // torch.sign, of which a NaN is a NaN: the parameter then shows that something is wrong.
    const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : direction;
    p = p * s.param_decay - s.lr * sign;
    state[0] = s.beta2 * state[0] + s.one_minus_beta2 * g;
  }
};

} // namespace zeroopt
