// A step over many segments as even shares of elements, however large or small the segments are.
//
//   active segments     |---- 0 ----|- 2 -|------------ 3 ------------|      (1 is inactive)
//   shares of 3 threads |-----0-----:-----1-------:--------2----------|
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "kernels.h"

namespace zeroopt::cpu {

template <class Scalars> class SegmentWork {
public:
  /// Raises the steps of the active segments. make_scalars(group row, step) gives the scalars of a segment.
  template <class MakeScalars> SegmentWork(const SegmentTable& table, const MakeScalars& make_scalars) {
    for (int64_t i = 0; i < table.count; ++i) {
      if (table.active[i] == 0) continue;
      const SegmentRow& row = table.rows[i];
      table.steps[i] += 1.0f;
      pieces_.push_back(Piece{row.offset, row.numel, numel_, make_scalars(row.group, table.steps[i])});
      numel_ += row.numel;
    }
  }

  /// Calls leaf(offset, numel, scalars) for ranges that cover all active segments, on up to num_threads threads.
  template <class Leaf> void run(int num_threads, const Leaf& leaf) const {
    const int threads = worthwhile_threads(numel_, kGrain, num_threads);
    parallel(threads, [&](int index) {
      const int64_t begin = share_begin(numel_, index, threads);
      const int64_t end = share_begin(numel_, index + 1, threads);
      for (auto piece = first_piece(begin); piece != pieces_.end() && piece->before < end; ++piece) {
        const int64_t from = cut(*piece, begin);
        const int64_t to = cut(*piece, end);
        if (from < to) leaf(piece->offset + from, to - from, piece->scalars);
      }
    });
  }

private:
  static constexpr int64_t kGrain = 16 * 1024; // elements a thread

  struct Piece {
    int64_t offset, numel;
    int64_t before; ///< elements of all pieces before this one
    Scalars scalars;
  };

  /// The last piece that begins at or before element `position` of the work.
  typename std::vector<Piece>::const_iterator first_piece(int64_t position) const {
    auto after = std::upper_bound(pieces_.begin(), pieces_.end(), position,
                                  [](int64_t value, const Piece& piece) { return value < piece.before; });
    return after == pieces_.begin() ? after : after - 1;
  }

  /// The element of the piece at which the work is cut at `position`: moved up to a cache line of the arrays.
  static int64_t cut(const Piece& piece, int64_t position) {
    const int64_t element = position - piece.before;
    if (element <= 0) return 0;
    const int64_t aligned = (piece.offset + element + kLine - 1) / kLine * kLine - piece.offset;
    return std::min(aligned, piece.numel);
  }

  std::vector<Piece> pieces_;
  int64_t numel_ = 0;
};

} // namespace zeroopt::cpu
