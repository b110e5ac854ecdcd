// One element of Adagrad (Duchi et al. 2011), in the form and order of operations of torch.optim.Adagrad.
//
//   g <- g + weight_decay * p
//   sum <- sum + g * g
//   p <- p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)
#pragma once

#include <math.h>

#include "ops/op.h"

namespace zeroopt {

struct Adagrad : StepOp {
  static constexpr const char* kName = "adagrad";
  ZEROOPT_COLUMNS(lr, lr_decay, weight_decay, eps, maximize);
  static constexpr State kStates[] = {{"sum", kUnsigned, kAlways}};

  struct Scalars {
    float grad_factor;
    float weight_decay;
    float step_size; ///< lr / (1 + (t - 1) * lr_decay)
    float eps;
  };

  ZEROOPT_INLINE Scalars scalars(const Group& group, const SegmentScalars& segment) {
    Scalars s;
    s.grad_factor = group.maximize != 0 ? -segment.grad_factor : segment.grad_factor;
    s.weight_decay = static_cast<float>(group.weight_decay);
    s.step_size = static_cast<float>(group.lr / (1.0 + (segment.step - 1.0) * group.lr_decay));
    s.eps = static_cast<float>(group.eps);
    return s;
  }

  template <unsigned, int size>
  ZEROOPT_INLINE void element(const Scalars& s, float& p, float g, float (&state)[size], float&) {
    g *= s.grad_factor;
    g = s.weight_decay != 0.0f ? g + s.weight_decay * p : g; // not g + 0 * p, which is NaN for an infinite p
    state[0] += g * g;
    p -= s.step_size * g / (sqrtf(state[0]) + s.eps);
  }
};

} // namespace zeroopt
