#include "fill_buckets.h"

#include <algorithm>
#include <utility>

namespace zeroopt {
namespace {

int64_t end_of(const BucketPlan& bucket) {
  return bucket.params.empty() ? 0 : bucket.offsets.back() + bucket.numels.back();
}

int64_t padding_of(const BucketPlan& bucket, const FillRule& rule) {
  const int64_t end = end_of(bucket);
  return round_up(std::max<int64_t>(end, 1), rule.unit) - end;
}

bool is_within_limit(const BucketPlan& bucket, const FillRule& rule, int64_t item_bytes) {
  return rule.limit.allows(padding_of(bucket, rule), end_of(bucket), item_bytes);
}

void append(BucketPlan& bucket, int64_t param, int64_t numel, int64_t alignment) {
  const int64_t offset = round_up(end_of(bucket), alignment);
  bucket.params.push_back(param);
  bucket.offsets.push_back(offset);
  bucket.numels.push_back(numel);
}

} // namespace

std::vector<BucketPlan> fill_buckets(const std::vector<ParamSpec>& params, const std::vector<int64_t>& indices,
                                     const FillRule& rule) {
  std::vector<BucketPlan> buckets;
  if (indices.empty()) return buckets;
  const ParamSpec& first = params[indices.front()];
  const BucketPlan empty{first.kind, first.whole_cost.has_value(), 0, {}, {}, {}, {}};
  const int64_t most_numel = rule.bucket_bytes / first.item_bytes;

  for (const int64_t index : indices) {
    const int64_t numel = params[index].numel;
    const bool is_beyond = !buckets.empty() && round_up(end_of(buckets.back()), rule.alignment) + numel > most_numel;
    if (buckets.empty() || (is_beyond && is_within_limit(buckets.back(), rule, first.item_bytes)))
      buckets.push_back(empty);
    append(buckets.back(), index, numel, rule.alignment);
  }
  while (buckets.size() > 1 && !is_within_limit(buckets.back(), rule, first.item_bytes)) {
    const BucketPlan last = std::move(buckets.back());
    buckets.pop_back();
    for (size_t i = 0; i < last.params.size(); ++i)
      append(buckets.back(), last.params[i], last.numels[i], rule.alignment);
  }
  for (BucketPlan& bucket : buckets)
    bucket.padded_numel = end_of(bucket) + padding_of(bucket, rule);
  return buckets;
}

} // namespace zeroopt
