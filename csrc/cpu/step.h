// One step of an optimizer over all segments: what the kernels of all optimizers share.
#pragma once

#include <vector>

#include "common/step_count.h"
#include "cpu/block.h"
#include "cpu/isa.h"
#include "cpu/segment_work.h"

namespace zeroopt::cpu {

inline bool is_skipped(const StepControl& control) {
  return control.found_inf != nullptr && *control.found_inf != 0.0f;
}

inline float grad_factor(const StepControl& control) {
  const float unscale = control.grad_scale == nullptr ? 1.0f : 1.0f / *control.grad_scale;
  return control.clip_coef == nullptr ? unscale : unscale * *control.clip_coef;
}

/// What a segment's elements are stepped with.
template <class Op> struct StepPlan {
  typename Op::Scalars scalars;
  unsigned states; ///< in use, as bits
  uint32_t step;   ///< see noise_step
};

template <class Op>
void step(const SegmentTable& table, const Storage& storage, const typename Op::Group* groups,
          const StepControl& control, const OpLeaves<Op>& leaves, int num_threads) {
  if (is_skipped(control)) return;
  std::vector<StepPlan<Op>> plans(static_cast<size_t>(table.count));
  const SegmentWork work(table);
  for (const SegmentWork::Piece& piece : work.pieces()) {
    const double step = Op::kCountsStep ? count_step(table, piece.segment) : steps_taken(table, piece.segment);
    const double* squares = table.squares == nullptr ? nullptr : table.squares + 2 * piece.segment;
    const typename Op::Group& group = groups[table.rows[piece.segment].group];
    plans[static_cast<size_t>(piece.segment)] = {Op::scalars(group, {step, grad_factor(control), squares}),
                                                 states_in_use<Op>(group), noise_step(step)};
  }

  // Where the arrays themselves are float32 and nothing is summed, no buffer limits how much is stepped at once.
  const bool in_place = storage.param == ParamFormat::float32 && storage.grad == DType::float32 &&
                        storage.state == StateFormat::float32 && !Op::kSumsSquares;
  const int64_t length = in_place ? INT64_MAX : kBlock;
  constexpr int kNumSums = Op::kSumsSquares ? 2 : 0;
  ChunkSums sums(work, kNumSums);
  const auto sum_squares = isa().leaves->sum_squares;
  work.run(num_threads, [&](const SegmentWork::Piece& piece, int64_t begin, int64_t end) {
    Block block(storage, control.seed, kSignedStates<Op>);
    const SegmentRow& row = table.rows[piece.segment];
    const StepPlan<Op>& plan = plans[static_cast<size_t>(piece.segment)];
    const StepLeaf<Op> leaf = leaves.leaf[plan.states];
    for (int64_t i = begin, numel; i < end; i += numel) {
      numel = std::min(length, end - i);
      block.load(row, i, numel, plan.states, Op::kReadsGrad);
      leaf(plan.scalars, block.param, block.grad, block.states, block.update(), numel);
      block.store(row, plan.step, plan.states, Op::kWritesParam, Op::kWritesStates);
      if (Op::kSumsSquares) {
        sums.of(piece, i, 0) += sum_squares(block.param, numel);
        sums.of(piece, i, 1) += sum_squares(block.update(), numel);
      }
    }
  });
  if (Op::kSumsSquares) sums.write(table.squares, 2);
}

} // namespace zeroopt::cpu
