#include "partition.h"

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>

#include "fill_buckets.h"
#include "whole_params.h"

namespace zeroopt {
namespace {

constexpr int64_t kMaxNumel = std::numeric_limits<int64_t>::max() / 16; // times the widest dtype it still fits 64 bits

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_arguments(const std::vector<ParamSpec>& params, int64_t world_size, Alignment alignments,
                     int64_t bucket_bytes, PaddingLimit limit) {
  require(world_size >= 1, "world_size must be at least 1, got " + std::to_string(world_size));
  require(alignments.param >= 1, "alignment must be at least 1, got " + std::to_string(alignments.param));
  require(alignments.slice >= 1, "slice_alignment must be at least 1, got " + std::to_string(alignments.slice));
  require(bucket_bytes >= 1, "bucket_bytes must be at least 1, got " + std::to_string(bucket_bytes));
  require(limit.share >= 0, "padding_share must not be negative, got " + std::to_string(limit.share));
  require(limit.bytes >= 0, "padding_bytes must not be negative, got " + std::to_string(limit.bytes));
  const int64_t alignment = std::max(alignments.param, alignments.slice);
  require(alignment <= kMaxNumel / world_size, "world_size * alignment is beyond 64 bits");
  int64_t total = 0, whole = 0, cost = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const ParamSpec& p = params[i];
    const std::string name = "parameter " + std::to_string(i);
    require(p.numel >= 0, name + ": numel must not be negative, got " + std::to_string(p.numel));
    require(p.kind >= 0, name + ": kind must not be negative, got " + std::to_string(p.kind));
    require(p.item_bytes >= 1 && p.item_bytes <= 16,
            name + ": item_bytes must be 1 to 16, got " + std::to_string(p.item_bytes));
    require(p.numel <= kMaxNumel - alignment - total, name + ": the sum of all sizes is beyond 64 bits");
    total += p.numel + alignment;
    if (!p.whole_cost) continue;
    require(*p.whole_cost >= 0, name + ": its cost must not be negative, got " + std::to_string(*p.whole_cost));
    require(*p.whole_cost <= kMaxNumel - cost, name + ": the sum of all costs is beyond 64 bits");
    cost += *p.whole_cost;
    // A bucket may be as large as world_size times its largest parameter, and its padding is priced.
    whole += p.numel + alignment;
    require(whole <= kMaxNumel / 16 / world_size, name + ": world_size times the sum of all sizes is beyond 64 bits");
  }
}

} // namespace

Plan::Plan(const std::vector<ParamSpec>& params, int64_t world_size, Alignment alignment, int64_t bucket_bytes,
           PaddingLimit limit)
    : world_size_(world_size), alignment_(alignment) {
  check_arguments(params, world_size, alignment, bucket_bytes, limit);

  std::map<int64_t, std::vector<int64_t>> cut; // parameters of a kind, in the order of their gradients
  for (int64_t i = static_cast<int64_t>(params.size()) - 1; i >= 0; --i)
    if (!params[i].whole_cost) cut[params[i].kind].push_back(i);
  const FillRule rule{alignment.param, world_size * alignment.slice, bucket_bytes, limit};
  for (const auto& [kind, indices] : cut)
    for (BucketPlan& bucket : fill_buckets(params, indices, rule))
      buckets_.push_back(std::move(bucket));
  for (BucketPlan& bucket : plan_whole(params, world_size, rule))
    buckets_.push_back(std::move(bucket));

  // A bucket is complete when its last gradient comes: smaller index, later gradient.
  auto last = [](const BucketPlan& b) { return *std::min_element(b.params.begin(), b.params.end()); };
  std::sort(buckets_.begin(), buckets_.end(),
            [&](const BucketPlan& a, const BucketPlan& b) { return last(a) > last(b); });
  verify(params);
}

int64_t Plan::shard_numel(int64_t bucket) const {
  return bucket_at(bucket).padded_numel / world_size_;
}

Range Plan::own_range(int64_t bucket, int64_t rank) const {
  const BucketPlan& b = bucket_at(bucket);
  require(0 <= rank && rank < world_size_,
          "there is no rank " + std::to_string(rank) + "; the plan has " + std::to_string(world_size_));
  if (b.owners.empty()) {
    const int64_t numel = b.padded_numel / world_size_;
    return {rank * numel, (rank + 1) * numel};
  }
  auto begin_of = [&b](std::vector<int64_t>::const_iterator owner) {
    if (owner == b.owners.end()) return b.offsets.back() + b.numels.back();
    return b.offsets[static_cast<size_t>(owner - b.owners.begin())];
  };
  return {begin_of(std::lower_bound(b.owners.begin(), b.owners.end(), rank)),
          begin_of(std::upper_bound(b.owners.begin(), b.owners.end(), rank))};
}

std::vector<Segment> Plan::segments(int64_t bucket, int64_t begin, int64_t end) const {
  const BucketPlan& b = bucket_at(bucket);
  require(0 <= begin && begin <= end && end <= b.padded_numel,
          "range [" + std::to_string(begin) + ", " + std::to_string(end) + ") is not within bucket " +
              std::to_string(bucket) + " of " + std::to_string(b.padded_numel) + " elements");
  // Start at the last parameter whose offset is not beyond `begin`; earlier ones end before it.
  auto first = std::upper_bound(b.offsets.begin(), b.offsets.end(), begin);
  size_t i = first == b.offsets.begin() ? 0 : static_cast<size_t>(first - b.offsets.begin()) - 1;
  std::vector<Segment> result;
  for (; i < b.params.size() && b.offsets[i] < end; ++i) {
    const int64_t from = std::max(begin, b.offsets[i]);
    const int64_t to = std::min(end, b.offsets[i] + b.numels[i]);
    if (from < to) result.push_back(Segment{b.params[i], from - b.offsets[i], from - begin, to - from});
  }
  return result;
}

const BucketPlan& Plan::bucket_at(int64_t bucket) const {
  require(0 <= bucket && bucket < static_cast<int64_t>(buckets_.size()),
          "there is no bucket " + std::to_string(bucket) + "; the plan has " + std::to_string(buckets_.size()));
  return buckets_[bucket];
}

// The layout carries other people's weights, so it checks itself each time it is made: it costs microseconds.
void Plan::verify(const std::vector<ParamSpec>& params) const {
  auto hold = [](bool condition, const char* what) {
    if (!condition) throw std::logic_error(std::string("zeroopt planner broke its own rule: ") + what);
  };
  std::vector<bool> placed(params.size(), false);
  for (const BucketPlan& b : buckets_) {
    const int64_t unit = b.whole && b.owners.empty() ? alignment_.param : alignment_.slice;
    hold(b.padded_numel % (world_size_ * unit) == 0, "slices are equal multiples of their alignment");
    const int64_t slice_numel = b.padded_numel / world_size_;
    int64_t end = 0;
    for (size_t i = 0; i < b.params.size(); ++i) {
      const ParamSpec& p = params[b.params[i]];
      hold(!placed[b.params[i]], "a parameter is placed once");
      placed[b.params[i]] = true;
      hold(p.kind == b.kind && p.numel == b.numels[i], "a bucket holds whole parameters of one kind");
      hold(b.offsets[i] >= end && b.offsets[i] % alignment_.param == 0, "parameters are aligned and do not overlap");
      end = b.offsets[i] + b.numels[i];
      hold(b.whole == p.whole_cost.has_value(), "whole parameters share no bucket with those that may be cut");
      hold(!b.whole || !b.owners.empty() || p.numel == 0 || b.offsets[i] / slice_numel == (end - 1) / slice_numel,
           "a whole parameter lies in one slice, or has an owner");
    }
    hold(b.owners.empty() || (b.whole && b.owners.size() == b.params.size()), "whole parameters alone have owners");
    hold(std::is_sorted(b.owners.begin(), b.owners.end()), "an owner's parameters lie side by side");
    hold(b.owners.empty() || (b.owners.front() >= 0 && b.owners.back() < world_size_), "owners are ranks");
    hold(end <= b.padded_numel, "parameters lie within their bucket");
  }
  hold(std::find(placed.begin(), placed.end(), false) == placed.end(), "every parameter is placed");
}

} // namespace zeroopt
