// Work over many segments as even shares of elements, however large or small the segments are.
//
//   active segments     |---- 0 ----|- 2 -|------------ 3 ------------|      (1 is inactive)
//   shares of 3 threads |-----0-----:-----1-------:--------2----------|
//
// A segment is cut at multiples of kChunk from its start only. What is computed of a chunk as a whole, a sum or the
// scale of a block, is then the same for any number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "kernels.h"

namespace zeroopt::cpu {

constexpr int64_t kChunk = 4096; // elements
static_assert(kChunk % kQuantBlock == 0, "a block has one scale, which one thread computes");

class SegmentWork {
public:
  struct Piece {
    int64_t segment;     ///< row of the table
    int64_t before;      ///< elements of all pieces before this one
    int64_t first_chunk; ///< chunks of all pieces before this one
    int64_t numel;
  };

  explicit SegmentWork(const SegmentTable& table) {
    for (int64_t i = 0; i < table.count; ++i) {
      if (table.active[i] == 0) continue;
      pieces_.push_back(Piece{i, numel_, num_chunks_, table.rows[i].numel});
      numel_ += table.rows[i].numel;
      num_chunks_ += (table.rows[i].numel + kChunk - 1) / kChunk;
    }
  }

  const std::vector<Piece>& pieces() const { return pieces_; }
  int64_t num_chunks() const { return num_chunks_; }

  /// Calls body(piece, begin, end) for ranges that cover all elements of all pieces, on up to num_threads threads.
  template <class Body> void run(int num_threads, const Body& body) const {
    const int threads = worthwhile_threads(numel_, kGrain, num_threads);
    parallel(threads, [&](int index) {
      const int64_t begin = share_begin(numel_, index, threads);
      const int64_t end = share_begin(numel_, index + 1, threads);
      for (auto piece = first_piece(begin); piece != pieces_.end() && piece->before < end; ++piece) {
        const int64_t from = cut(*piece, begin);
        const int64_t to = cut(*piece, end);
        if (from < to) body(*piece, from, to);
      }
    });
  }

private:
  static constexpr int64_t kGrain = 16 * 1024; // elements a thread

  /// The last piece that begins at or before element `position` of the work.
  std::vector<Piece>::const_iterator first_piece(int64_t position) const {
    auto after = std::upper_bound(pieces_.begin(), pieces_.end(), position,
                                  [](int64_t value, const Piece& piece) { return value < piece.before; });
    return after == pieces_.begin() ? after : after - 1;
  }

  /// The element of the piece at which the work is cut at `position`.
  static int64_t cut(const Piece& piece, int64_t position) {
    const int64_t element = position - piece.before;
    if (element <= 0) return 0;
    return std::min((element + kChunk - 1) / kChunk * kChunk, piece.numel);
  }

  std::vector<Piece> pieces_;
  int64_t numel_ = 0;
  int64_t num_chunks_ = 0;
};

/// Sums over the pieces of a work, `width` for each, that do not depend on which thread adds which chunk.
class ChunkSums {
public:
  ChunkSums(const SegmentWork& work, int width)
      : work_(work), width_(width), sums_(static_cast<size_t>(work.num_chunks() * width)) {}

  /// The sum of the chunk of a piece that element `begin` lies in; one thread at a time adds to it.
  double& of(const SegmentWork::Piece& piece, int64_t begin, int which) {
    return sums_[static_cast<size_t>((piece.first_chunk + begin / kChunk) * width_ + which)];
  }

  /// result[segment of the piece][which], rows of `stride`; other rows stay.
  void write(double* result, int64_t stride) const {
    for (const SegmentWork::Piece& piece : work_.pieces()) {
      const int64_t chunks = (piece.numel + kChunk - 1) / kChunk;
      for (int which = 0; which < width_; ++which) {
        double total = 0.0;
        for (int64_t c = 0; c < chunks; ++c)
          total += sums_[static_cast<size_t>((piece.first_chunk + c) * width_ + which)];
        result[piece.segment * stride + which] = total;
      }
    }
  }

private:
  const SegmentWork& work_;
  int width_;
  std::vector<double> sums_;
};

} // namespace zeroopt::cpu
