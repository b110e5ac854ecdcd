// Bucket and shard planning: which parameter lies where in which bucket, and which rank owns which slice.
//
// A plan is pure integers. It is the same on every rank, for it is computed from the same list of parameters.
//
//   parameters, last one first      w5   b4      w4        b3  w3   ...
//   bucket 0                      | w5 . b4 . w4      :pad |
//   its slices (world_size = 4)   |  0   |  1   |  2  |  3 |      rank r owns slice r of every bucket
//
// Every parameter starts at a multiple of one alignment, lies in one bucket in one piece, and every bucket is padded so
// that its slices are equally long multiples of another one. The gaps (.) and the padding belong to no parameter.
// Padding grows with the number of ranks, so where it would be too much of a bucket, buckets grow too.
//
// Slices cut through parameters. Those that have to stay whole lie in one slice each, or are brought from all slices to
// the rank that steps them: see whole_params.h.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace zeroopt {

/// What the planner needs to know of one parameter.
struct ParamSpec {
  int64_t numel;      ///< elements, >= 0
  int64_t kind;       ///< parameters share a bucket only with parameters of the same kind (dtype and device), >= 0
  int64_t item_bytes; ///< bytes an element, > 0; the same for all parameters of a kind
  std::optional<int64_t> whole_cost = {}; ///< what it costs to step it in one piece, >= 0; nothing: it may be cut
};

/// Elements at whose multiples something begins.
struct Alignment {
  int64_t param; ///< parameters in their bucket, >= 1
  int64_t slice; ///< slices that cut parameters, >= 1
};

/// How much of a bucket may be padding: the larger of the two.
struct PaddingLimit {
  double share;  ///< of its contents, >= 0
  int64_t bytes; ///< >= 0; what is not worth a larger bucket

  bool allows(int64_t padding, int64_t contents, int64_t item_bytes) const {
    const int64_t some = contents > 0 ? contents : 1; // of which an infinite share is no NaN
    return padding <= bytes / item_bytes || static_cast<double>(padding) <= share * static_cast<double>(some);
  }
};

/// One bucket: parameters side by side in flat storage.
struct BucketPlan {
  int64_t kind;
  bool whole;                   ///< ranks step its parameters whole; such ones share no bucket with others
  int64_t padded_numel;         ///< a multiple of the number of ranks and of the alignment of slices
  std::vector<int64_t> params;  ///< indices into the list of parameters, by rising offset
  std::vector<int64_t> offsets; ///< first element of each parameter in the bucket
  std::vector<int64_t> numels;  ///< elements of each parameter
  std::vector<int64_t> owners;  ///< the rank that steps each parameter, never falling; empty: each rank steps its slice
};

/// First and last element, plus one.
using Range = std::pair<int64_t, int64_t>;

/// The part of one parameter that lies in a range of a bucket.
struct Segment {
  int64_t param;  ///< index into the list of parameters
  int64_t start;  ///< first element of the parameter that is in the range
  int64_t offset; ///< where it lies, counted from the beginning of the range
  int64_t numel;  ///< > 0
};

class Plan {
public:
  /// Fills buckets with the parameters in reverse order, the order in which backward yields their gradients.
  ///
  /// Where they may be cut, as `fill_buckets` does it; for whole parameters, `plan_whole` does.
  /// Buckets are ordered by the parameter that completes them.
  ///
  /// @throws std::invalid_argument for a negative size, cost or limit, a world_size or alignment below 1, or sizes
  /// beyond 64 bits.
  Plan(const std::vector<ParamSpec>& params, int64_t world_size, Alignment alignment, int64_t bucket_bytes,
       PaddingLimit limit);

  const std::vector<BucketPlan>& buckets() const { return buckets_; }
  int64_t world_size() const { return world_size_; }
  int64_t alignment() const { return alignment_.param; }

  /// Elements of one rank's slice of a bucket.
  int64_t shard_numel(int64_t bucket) const;

  /// The elements of a bucket that a rank steps: its slice, or, where parameters have owners, from the first of its own
  /// to the first of the next owner's. Ranges of all ranks follow one another, and hold all parameters.
  /// @throws std::invalid_argument when there is no such bucket or rank.
  Range own_range(int64_t bucket, int64_t rank) const;

  /// The segments in elements [begin, end) of a bucket, by rising offset. Empty parameters have none.
  /// @throws std::invalid_argument when the bucket or the range does not exist.
  std::vector<Segment> segments(int64_t bucket, int64_t begin, int64_t end) const;

private:
  void verify(const std::vector<ParamSpec>& params) const;
  const BucketPlan& bucket_at(int64_t bucket) const;

  int64_t world_size_;
  Alignment alignment_;
  std::vector<BucketPlan> buckets_;
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

} // namespace zeroopt
