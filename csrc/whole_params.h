// Buckets for parameters that an optimizer has to step in one piece, for it looks at whole matrices or norms.
//
// In slices: each such parameter lies in one slice of its bucket, so that one rank owns all of it.
//
//   parameters, last one first    w7 w6 w5 w4 w3 w2 w1   of 4, 4, 3, 1, 4, 4 and 3 times d * d elements
//   bucket 0                    | w7     | w6     | w5   w4 |
//   bucket 1                    | w3     | w2     | w1   :  |    (:) padding: slices are as long as the fullest one
//   its slices (world_size = 3) |  0     |  1     |  2      |    rank r steps all that lies in slice r
//
// A bucket cannot be smaller than world_size times its largest parameter. What fits beside that one costs nothing, so
// where parameters are large a bucket holds more than bucket_bytes: as many as it takes to fill its slices evenly. With
// more ranks than that, slices cannot be filled, and most of a bucket would be padding.
//
// By owners: a bucket is cut evenly, like any other, and each parameter has a rank that steps it. For the step, what
// lies in other ranks' slices is brought to that rank, and back.
//
//   bucket 0                    | w7   . w6  :  . w5 w4 |        its slices (world_size = 8) cut parameters
//   what ranks step             | 0      | 3      | 5   |        an owner's parameters lie side by side
#pragma once

#include <cstdint>
#include <vector>

#include "fill_buckets.h"
#include "partition.h"

namespace zeroopt {

/// Buckets for those of the parameters that have a cost; no bucket where none has.
///
/// Slices hold the parameters of a kind where their padding is within the limit, for then nothing has to be brought
/// anywhere. In the order in which gradients arrive, the parameters are divided
/// into buckets such that
///
///     16 * padding + 8 * (contents beyond bucket_bytes) + bucket_bytes
///
/// is least, summed over the buckets: padding is stored and travels, large buckets start to travel late, and each
/// bucket costs a few messages. Within a bucket, the largest parameter goes first, always into the emptiest slice.
/// Which rank gets which slice is then decided such that every rank's cost over the whole plan is about the same.
///
/// The others get owners, by `assign_owners` over the whole plan, in buckets that `fill_buckets` fills.
///
/// @param params all parameters of a plan, checked.
std::vector<BucketPlan> plan_whole(const std::vector<ParamSpec>& params, int64_t world_size, const FillRule& rule);

} // namespace zeroopt
