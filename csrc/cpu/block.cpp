#include "cpu/block.h"

#include "common/dtype.h"
#include "cpu/isa.h"

namespace zeroopt::cpu {
namespace {

template <class T> T* at(void* array, int64_t begin) {
  return static_cast<T*>(array) + begin;
}

/// A 16-bit array as float32.
void widen(const LeafTable& leaves, DType dtype, const uint16_t* array, float* values, int64_t numel) {
  leaves.pack->leaf[dtype_index(dtype)][dtype_index(DType::float32)](array, values, numel, 1.0);
}

} // namespace

Block::Block(const Storage& storage, uint64_t seed, unsigned signed_states)
    : storage_(storage), seed_(seed), leaves_(*isa().leaves), signed_states_(signed_states) {}

void Block::load(const SegmentRow& row, int64_t begin, int64_t numel, unsigned in_use, bool with_grad) {
  begin_ = begin;
  numel_ = numel;
  param = load_param(row);
  if (with_grad) grad = load_grad(row);
  for (int k = 0; k < kMaxStates; ++k)
    if (in_use >> k & 1u) states[k] = load_state(row, k);
}

void Block::store(const SegmentRow& row, uint32_t step, unsigned in_use, bool with_param, bool with_states) {
  if (with_param) store_param(row, step);
  for (int k = 0; k < kMaxStates; ++k)
    if (with_states && (in_use >> k & 1u)) store_state(row, k, step);
}

float* Block::load_param(const SegmentRow& row) {
  switch (storage_.param) {
  case ParamFormat::float32:
    return at<float>(row.param, begin_);
  case ParamFormat::bfloat16_master:
  case ParamFormat::float16_master:
    return at<float>(row.master, begin_);
  case ParamFormat::bfloat16_remainder:
    leaves_.formats->join(at<uint16_t>(row.param, begin_), at<uint16_t>(row.master, begin_), param_, numel_);
    return param_;
  case ParamFormat::bfloat16_stochastic:
    widen(leaves_, DType::bfloat16, at<uint16_t>(row.param, begin_), param_, numel_);
    return param_;
  }
  return nullptr;
}

const float* Block::load_grad(const SegmentRow& row) {
  if (storage_.grad == DType::float32) return static_cast<const float*>(row.grad) + begin_;
  widen(leaves_, storage_.grad, static_cast<const uint16_t*>(row.grad) + begin_, grad_, numel_);
  return grad_;
}

float* Block::load_state(const SegmentRow& row, int state) {
  switch (storage_.state) {
  case StateFormat::float32:
    return at<float>(row.states[state], begin_);
  case StateFormat::bfloat16:
    widen(leaves_, DType::bfloat16, at<uint16_t>(row.states[state], begin_), states_[state], numel_);
    return states_[state];
  case StateFormat::int8:
    leaves_.formats->decode[is_signed(state)](at<uint8_t>(row.states[state], begin_),
                                              row.scales[state] + begin_ / kQuantBlock, states_[state], numel_);
    return states_[state];
  }
  return nullptr;
}

void Block::store_param(const SegmentRow& row, uint32_t step) {
  uint16_t* const rounded = at<uint16_t>(row.param, begin_);
  switch (storage_.param) {
  case ParamFormat::float32:
    return;
  case ParamFormat::bfloat16_master:
    return leaves_.formats->round_ties_away(param, rounded, numel_);
  case ParamFormat::float16_master:
    return leaves_.pack->leaf[dtype_index(DType::float32)][dtype_index(DType::float16)](param, rounded, numel_, 1.0);
  case ParamFormat::bfloat16_remainder:
    return leaves_.formats->split(param, rounded, at<uint16_t>(row.master, begin_), numel_);
  case ParamFormat::bfloat16_stochastic:
    return leaves_.formats->round_stochastic(param, draw(row, step, 0), rounded, numel_);
  }
}

void Block::store_state(const SegmentRow& row, int state, uint32_t step) {
  const float* const values = states[state];
  switch (storage_.state) {
  case StateFormat::float32:
    return;
  case StateFormat::bfloat16:
    return leaves_.formats->round_stochastic(values, draw(row, step, 1 + static_cast<uint32_t>(state)),
                                             at<uint16_t>(row.states[state], begin_), numel_);
  case StateFormat::int8: {
    uint8_t* const codes = at<uint8_t>(row.states[state], begin_);
    float* const scales = row.scales[state] + begin_ / kQuantBlock;
    if (is_signed(state)) return leaves_.formats->encode_signed(values, codes, scales, numel_);
    const uint16_t* const random = draw(row, step, 1 + static_cast<uint32_t>(state));
    return leaves_.formats->encode_unsigned(values, random, codes, scales, numel_);
  }
  }
}

const uint16_t* Block::draw(const SegmentRow& row, uint32_t step, uint32_t array) {
  const int64_t element = row.first + begin_;
  const int64_t lead = element % kNoisePerCall; // elements of the first call that belong to what is before the block
  const int64_t calls = (lead + numel_ + kNoisePerCall - 1) / kNoisePerCall;
  const NoiseKey key = {seed_, step, static_cast<uint32_t>(row.key), array};
  leaves_.formats->draw_noise(key, static_cast<uint64_t>(element / kNoisePerCall), calls, random_);
  return reinterpret_cast<const uint16_t*>(random_) + lead; // the lowest bits come first
}

} // namespace zeroopt::cpu
