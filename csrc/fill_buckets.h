// Buckets filled one after the other, in the order in which gradients arrive.
//
//   closed       a next parameter would take it beyond bucket_bytes, and its padding is within the limit
//   grows        its padding is not: with many ranks a unit of padding is large, and a bucket is filled up with
//   parameters
//                until the padding is small beside them
//   merged       the last bucket, with those before it, until its padding is within the limit too
#pragma once

#include <cstdint>
#include <vector>

#include "partition.h"

namespace zeroopt {

/// How buckets are filled.
struct FillRule {
  int64_t alignment;    ///< elements, at whose multiples parameters begin
  int64_t unit;         ///< elements, of which every bucket has a multiple
  int64_t bucket_bytes; ///< beyond which no parameter is added, unless padding asks for it
  PaddingLimit limit;
};

/// Buckets of parameters that slices may cut.
///
/// Within the limit is: the padding behind the last parameter. A bucket of 1 / limit.share units or more always is.
///
/// @param indices of parameters of one kind, in the order of their gradients.
std::vector<BucketPlan> fill_buckets(const std::vector<ParamSpec>& params, const std::vector<int64_t>& indices,
                                     const FillRule& rule);

} // namespace zeroopt
