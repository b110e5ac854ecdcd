// A short stretch of a segment as float32 arrays: where they are stored as float32 the arrays themselves, elsewhere
// buffers that stay in the processor's cache. So every optimizer's loop is compiled once, not once for every format,
// and memory is still read and written once.
#pragma once

#include "cpu/leaf/table.h"

namespace zeroopt::cpu {

// Elements. So short that memory keeps working: the processor's prefetcher runs ahead of what is being loaded by about
// as much, so its loads arrive while the conversions compute. With 1024 elements the two would take turns.
constexpr int64_t kBlock = 256;
static_assert(kBlock % kQuantBlock == 0 && kBlock % kNoisePerCall == 0, "blocks are cut where formats may be cut");

/// One thread's buffers, and the conversions between them and a segment.
class Block {
public:
  /// @param signed_states bit k: state k can be negative
  Block(const Storage& storage, uint64_t seed, unsigned signed_states);

  /// Elements [begin, begin + numel) of a segment: fills `param`, `grad` and `states`.
  /// @param in_use bit k: the segment's group uses state k
  void load(const SegmentRow& row, int64_t begin, int64_t numel, unsigned in_use, bool with_grad);

  /// Writes back what `load` did not give the arrays themselves of.
  /// @param step the number of this step, for random numbers
  void store(const SegmentRow& row, uint32_t step, unsigned in_use, bool with_param, bool with_states);

  float* param = nullptr;
  const float* grad = nullptr;
  float* states[kMaxStates] = {};
  float* update() { return update_; }

private:
  float* load_param(const SegmentRow& row);
  const float* load_grad(const SegmentRow& row);
  float* load_state(const SegmentRow& row, int state);
  void store_param(const SegmentRow& row, uint32_t step);
  void store_state(const SegmentRow& row, int state, uint32_t step);
  bool is_signed(int state) const { return signed_states_ >> state & 1u; }
  /// 16 random bits for each element of one array, see common/philox.h.
  const uint16_t* draw(const SegmentRow& row, uint32_t step, uint32_t array);

  Storage storage_;
  uint64_t seed_;
  const LeafTable& leaves_;
  int64_t begin_ = 0;
  int64_t numel_ = 0;
  unsigned signed_states_;
  alignas(64) float param_[kBlock];
  alignas(64) float grad_[kBlock];
  alignas(64) float states_[kMaxStates][kBlock];
  alignas(64) float update_[kBlock];
  alignas(64) uint64_t random_[kBlock / 4 + 2]; // a block may begin in the middle of a call
};

} // namespace zeroopt::cpu
