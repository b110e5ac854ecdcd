// One element of SGD with momentum (Sutskever et al. 2013), in the form and order of operations of torch.optim.SGD,
// whose learning rate stands outside of the momentum.
//
//   g <- g + weight_decay * p
//   b <- momentum * b + (1 - dampening) * g        the first step: b <- g
//   g <- b, or g + momentum * b with Nesterov
//   p <- p - lr * g
#pragma once

#include "ops/op.h"

namespace zeroopt {

struct Sgd : StepOp {
  static constexpr const char* kName = "sgd";
  ZEROOPT_COLUMNS(lr, momentum, dampening, weight_decay, nesterov, maximize);
  static constexpr State kStates[] = {{"momentum_buffer", kSigned, Column::momentum}};

  struct Scalars {
    float grad_factor;
    float weight_decay;
    float lr;
    float momentum;
    float one_minus_dampening;
    float nesterov; ///< 1 or 0
    float first;    ///< 1 in the first step, when the buffer holds nothing yet
  };

  ZEROOPT_INLINE Scalars scalars(const Group& group, const SegmentScalars& segment) {
    Scalars s;
    s.grad_factor = group.maximize != 0 ? -segment.grad_factor : segment.grad_factor;
    s.weight_decay = static_cast<float>(group.weight_decay);
    s.lr = static_cast<float>(group.lr);
    s.momentum = static_cast<float>(group.momentum);
    s.one_minus_dampening = static_cast<float>(1.0 - group.dampening);
    s.nesterov = group.nesterov != 0 ? 1.0f : 0.0f;
    s.first = segment.step <= 1.0 ? 1.0f : 0.0f;
    return s;
  }

  template <unsigned states, int size>
  ZEROOPT_INLINE void element(const Scalars& s, float& p, float g, float (&state)[size], float&) {
    g *= s.grad_factor;
    g = s.weight_decay != 0.0f ? g + s.weight_decay * p : g; // not g + 0 * p, which is NaN for an infinite p
    if constexpr (states & 1u) {
      const float buffer = s.first != 0.0f ? g : s.momentum * state[0] + s.one_minus_dampening * g;
      state[0] = buffer;
      g = s.nesterov != 0.0f ? g + s.momentum * buffer : buffer;
    }
    p -= s.lr * g;
  }
};

} // namespace zeroopt
