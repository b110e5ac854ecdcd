// One element of SGD with momentum (Sutskever et al. 2013), in the form and order of operations of torch.optim.SGD,
// whose learning rate stands outside of the momentum.
//
//   g <- g + weight_decay * p
//   b <- momentum * b + (1 - dampening) * g        the first step: b <- g
//   g <- b, or g + momentum * b with Nesterov
//   p <- p - lr * g
#pragma once

#include "common/host_device.h"
#include "kernels.h"

namespace zeroopt {

/// What a group and a step number come to, the same for all elements of a segment.
struct SgdScalars {
  float grad_sign; ///< -1 to maximize
  float weight_decay;
  float lr;
  float momentum; ///< 0: there is no momentum buffer
  float one_minus_dampening;
  float nesterov; ///< 1 or 0
  float first;    ///< 1 in the first step, when the buffer holds nothing yet
};

/// @param step the number of this step, counted from 1
ZEROOPT_INLINE SgdScalars sgd_scalars(const SgdGroup& group, float step) {
  SgdScalars s;
  s.grad_sign = group.maximize != 0 ? -1.0f : 1.0f;
  s.weight_decay = static_cast<float>(group.weight_decay);
  s.lr = static_cast<float>(group.lr);
  s.momentum = static_cast<float>(group.momentum);
  s.one_minus_dampening = static_cast<float>(1.0 - group.dampening);
  s.nesterov = group.nesterov != 0 ? 1.0f : 0.0f;
  s.first = step <= 1.0f ? 1.0f : 0.0f;
  return s;
}

/// @param b momentum buffer, in/out; null without momentum
ZEROOPT_INLINE void sgd_element(const SgdScalars& s, float& p, float g, float* b) {
  g *= s.grad_sign;
  g = s.weight_decay != 0.0f ? g + s.weight_decay * p : g; // not g + 0 * p, which is NaN for an infinite p
  if (b != nullptr) {
    const float buffer = s.first != 0.0f ? g : s.momentum * *b + s.one_minus_dampening * g;
    *b = buffer;
    g = s.nesterov != 0.0f ? g + s.momentum * buffer : buffer;
  }
  p -= s.lr * g;
}

} // namespace zeroopt
