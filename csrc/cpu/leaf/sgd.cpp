// sgd: one step over a range. bytes: 12 an element, 20 with momentum.
#include "cpu/leaf/table.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

template <bool momentum> void step(const SgdTensors& tensors, int64_t numel, const SgdScalars& scalars) {
  float* param = tensors.param;
  const float* grad = tensors.grad;
  float* momentum_buffer = tensors.momentum_buffer;
  const SgdScalars s = scalars; // a copy no store can change
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i) {
    float p = param[i];
    float buffer = momentum ? momentum_buffer[i] : 0.0f;
    sgd_element(s, p, grad[i], momentum ? &buffer : nullptr);
    param[i] = p;
    if (momentum) momentum_buffer[i] = buffer;
  }
}

} // namespace

void sgd(const SgdTensors& tensors, int64_t numel, const SgdScalars& scalars) {
  tensors.momentum_buffer == nullptr ? step<false>(tensors, numel, scalars) : step<true>(tensors, numel, scalars);
}

} // namespace zeroopt::cpu::ZEROOPT_ISA
