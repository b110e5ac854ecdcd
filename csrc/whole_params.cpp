#include "whole_params.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <queue>
#include <utility>

#include "owners.h"

namespace zeroopt {
namespace {

constexpr int64_t kPaddingPrice = 16; // of an element; the bucket itself costs as much as its target in elements
constexpr int64_t kBeyondPrice = 8;   // of an element beyond the target
// Of very many parameters, not each may be a bucket's last: planning would take seconds.
constexpr size_t kAllCuts = 256;   // up to so many, each may
constexpr int64_t kMostCuts = 128; // of more, about so many

struct Item {
  int64_t param;
  int64_t numel; ///< rounded up to the alignment
  int64_t cost;
};

using Items = std::vector<Item>;

/// The parameters in each slice of a bucket.
struct Slices {
  int64_t kind;
  int64_t slice_numel;
  std::vector<Items> items;
};

bool is_larger(const Item& a, const Item& b) {
  return a.numel != b.numel ? a.numel > b.numel : a.param > b.param;
}

int64_t sum_of(const Items& items, int64_t Item::* member) {
  return std::accumulate(items.begin(), items.end(), int64_t{0},
                         [member](int64_t sum, const Item& item) { return sum + item.*member; });
}

/// Puts each item, the largest first, into the emptiest slice (longest processing time first; Graham 1969).
/// @return elements of the fullest slice
template <class Put> int64_t fill_slices(const Items& largest_first, int64_t world_size, Put put) {
  using Slice = std::pair<int64_t, size_t>; // filled so far, number
  std::priority_queue<Slice, std::vector<Slice>, std::greater<Slice>> slices;
  const size_t usable = std::min(largest_first.size(), static_cast<size_t>(world_size));
  for (size_t i = 0; i < usable; ++i)
    slices.push({0, i});
  int64_t fullest = 0;
  for (const Item& item : largest_first) {
    auto [filled, slice] = slices.top();
    slices.pop();
    put(slice, item);
    slices.push({filled + item.numel, slice});
    fullest = std::max(fullest, filled + item.numel);
  }
  return fullest;
}

/// Items before which a bucket may begin, and the end. All of them, unless there are very many.
std::vector<size_t> possible_cuts(const Items& items) {
  const int64_t least = items.size() <= kAllCuts ? 0 : sum_of(items, &Item::numel) / kMostCuts;
  std::vector<size_t> cuts{0};
  int64_t since = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    since += items[i].numel;
    if (since >= least || i + 1 == items.size()) {
      cuts.push_back(i + 1);
      since = 0;
    }
  }
  return cuts;
}

/// So many items of one size.
struct Alike {
  int64_t numel;
  int64_t count;
};

/// Sizes of items, the largest first and each of them once: all that the price of a bucket depends on.
using Sizes = std::vector<Alike>;

bool has_larger(const Alike& a, const Alike& b) {
  return a.numel > b.numel;
}

void unite_equal(Sizes& sorted) {
  size_t kept = 0;
  for (size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i].numel == sorted[kept].numel)
      sorted[kept].count += sorted[i].count;
    else
      sorted[++kept] = sorted[i];
  }
  sorted.resize(kept + 1);
}

Sizes sizes_of(const Items& items, size_t begin, size_t end) {
  Sizes sizes;
  for (size_t i = begin; i < end; ++i)
    sizes.push_back({items[i].numel, 1});
  std::sort(sizes.begin(), sizes.end(), has_larger);
  unite_equal(sizes);
  return sizes;
}

Sizes merged(const Sizes& a, const Sizes& b) {
  Sizes both;
  both.reserve(a.size() + b.size());
  std::merge(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both), has_larger);
  unite_equal(both);
  return both;
}

int64_t count_of(const Sizes& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{0},
                         [](int64_t sum, const Alike& alike) { return sum + alike.count; });
}

/// What fill_slices returns for items of these sizes.
int64_t fullest_slice(const Sizes& sizes, int64_t world_size) {
  const int64_t usable = std::min(count_of(sizes), world_size);
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<int64_t>> slices;
  for (int64_t i = 0; i < usable; ++i)
    slices.push(0);
  int64_t fullest = 0, level = 0; // both of what is in a slice beside `level`, which is in each
  for (const auto& [numel, count] : sizes) {
    for (int64_t left = count; left > 0; --left) {
      // No two slices are further apart than one item is long: from here on, each gets one in turn.
      if (fullest - slices.top() <= numel) {
        level += left / usable * numel;
        left %= usable;
        if (left == 0) break;
      }
      const int64_t filled = slices.top() + numel;
      slices.pop();
      slices.push(filled);
      fullest = std::max(fullest, filled);
    }
  }
  return level + fullest;
}

/// The buckets of one kind, each as the range of items from one cut to the next, at the least price in total.
std::vector<size_t> best_cuts(const Items& items, int64_t world_size, int64_t target) {
  const std::vector<size_t> cuts = possible_cuts(items);
  const Item& largest = *std::min_element(items.begin(), items.end(), is_larger);
  const int64_t most = std::max(target, 2 * world_size * largest.numel); // of a bucket; more would not fill it better
  std::vector<Sizes> between;                                            // one cut and the next
  for (size_t i = 0; i + 1 < cuts.size(); ++i)
    between.push_back(sizes_of(items, cuts[i], cuts[i + 1]));
  std::vector<int64_t> price(cuts.size(), std::numeric_limits<int64_t>::max());
  std::vector<size_t> before(cuts.size(), 0);
  price[0] = 0;
  for (size_t end = 1; end < cuts.size(); ++end) {
    Sizes bucket;
    int64_t contents = 0;
    for (size_t begin = end; begin-- > 0 && contents <= most;) {
      bucket = merged(bucket, between[begin]);
      for (const auto& [numel, count] : between[begin])
        contents += numel * count;
      const int64_t rest = price[begin] + target + kBeyondPrice * std::max<int64_t>(0, contents - target);
      const int64_t least_fullest = std::max(bucket.front().numel, (contents + world_size - 1) / world_size);
      if (rest + kPaddingPrice * (world_size * least_fullest - contents) >= price[end]) continue; // whatever the slices
      const int64_t total = rest + kPaddingPrice * (world_size * fullest_slice(bucket, world_size) - contents);
      if (total < price[end]) {
        price[end] = total;
        before[end] = begin;
      }
    }
  }
  std::vector<size_t> result{items.size()};
  for (size_t end = cuts.size() - 1; end > 0; end = before[end])
    result.push_back(cuts[before[end]]);
  std::reverse(result.begin(), result.end());
  return result;
}

Slices slice_up(int64_t kind, Items items, int64_t world_size, int64_t alignment) {
  std::sort(items.begin(), items.end(), is_larger);
  Slices slices{kind, 0, std::vector<Items>(world_size)};
  const int64_t fullest =
      fill_slices(items, world_size, [&](size_t slice, const Item& item) { slices.items[slice].push_back(item); });
  slices.slice_numel = std::max(fullest, alignment);
  return slices;
}

/// Gives the costliest slice of each bucket to the rank with the least to do so far, buckets with the costliest first.
/// @return what each rank has to do
std::vector<int64_t> balance(std::vector<Slices>& buckets, int64_t world_size) {
  std::vector<int64_t> load(world_size, 0);
  auto cost = [](const Items& items) { return sum_of(items, &Item::cost); };
  for (Slices& bucket : buckets)
    std::stable_sort(bucket.items.begin(), bucket.items.end(),
                     [&](const Items& a, const Items& b) { return cost(a) > cost(b); });
  std::vector<Slices*> order;
  for (Slices& bucket : buckets)
    order.push_back(&bucket);
  std::stable_sort(order.begin(), order.end(),
                   [&](const Slices* a, const Slices* b) { return cost(a->items.front()) > cost(b->items.front()); });
  for (Slices* bucket : order) {
    std::vector<int64_t> ranks(world_size);
    std::iota(ranks.begin(), ranks.end(), int64_t{0});
    std::stable_sort(ranks.begin(), ranks.end(), [&](int64_t a, int64_t b) { return load[a] < load[b]; });
    std::vector<Items> by_rank(world_size);
    for (int64_t i = 0; i < world_size; ++i) {
      load[ranks[i]] += cost(bucket->items[i]);
      by_rank[ranks[i]] = std::move(bucket->items[i]);
    }
    bucket->items = std::move(by_rank);
  }
  return load;
}

BucketPlan lay_out(const Slices& slices, const std::vector<ParamSpec>& params) {
  const int64_t world_size = static_cast<int64_t>(slices.items.size());
  BucketPlan bucket{slices.kind, true, world_size * slices.slice_numel, {}, {}, {}, {}};
  for (int64_t rank = 0; rank < world_size; ++rank) {
    int64_t offset = rank * slices.slice_numel;
    for (const Item& item : slices.items[rank]) {
      bucket.params.push_back(item.param);
      bucket.offsets.push_back(offset);
      bucket.numels.push_back(params[item.param].numel);
      offset += item.numel;
    }
  }
  return bucket;
}

/// The buckets of one kind whose parameters lie in one slice each.
std::vector<Slices> in_slices(int64_t kind, const Items& items, int64_t world_size, const FillRule& rule,
                              int64_t item_bytes) {
  const int64_t total = std::max(sum_of(items, &Item::numel), rule.alignment);
  const int64_t target = std::clamp<int64_t>(rule.bucket_bytes / item_bytes, 1, total);
  const std::vector<size_t> cuts = best_cuts(items, world_size, target);
  std::vector<Slices> buckets;
  for (size_t i = 0; i + 1 < cuts.size(); ++i)
    buckets.push_back(slice_up(
        kind, Items(items.begin() + static_cast<int64_t>(cuts[i]), items.begin() + static_cast<int64_t>(cuts[i + 1])),
        world_size, rule.alignment));
  return buckets;
}

bool is_within_limit(const std::vector<Slices>& buckets, const FillRule& rule, int64_t item_bytes) {
  int64_t padded = 0, contents = 0;
  for (const Slices& bucket : buckets) {
    padded += bucket.slice_numel * static_cast<int64_t>(bucket.items.size());
    for (const Items& items : bucket.items)
      contents += sum_of(items, &Item::numel);
  }
  const auto count = static_cast<int64_t>(buckets.size());
  return PaddingLimit{rule.limit.share, rule.limit.bytes * count}.allows(padded - contents, contents, item_bytes);
}

/// Lets the parameters of each owner lie side by side.
void sort_by_owner(BucketPlan& bucket, const std::vector<int64_t>& owner_of, int64_t alignment) {
  std::vector<size_t> order(bucket.params.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return owner_of[bucket.params[a]] < owner_of[bucket.params[b]]; });
  BucketPlan sorted{bucket.kind, bucket.whole, bucket.padded_numel, {}, {}, {}, {}};
  int64_t offset = 0;
  for (const size_t i : order) {
    sorted.params.push_back(bucket.params[i]);
    sorted.offsets.push_back(offset);
    sorted.numels.push_back(bucket.numels[i]);
    sorted.owners.push_back(owner_of[bucket.params[i]]);
    offset += round_up(bucket.numels[i], alignment);
  }
  bucket = std::move(sorted);
}

/// The buckets of parameters that lie across slices.
std::vector<BucketPlan> by_owners(const std::vector<ParamSpec>& params, const std::vector<Items>& kinds,
                                  const std::vector<int64_t>& loads, const FillRule& rule) {
  std::vector<BucketPlan> buckets;
  std::vector<int64_t> owned, costs;
  // Ends are rounded up here: in another order another parameter comes last.
  std::vector<ParamSpec> aligned = params;
  for (const Items& items : kinds) {
    std::vector<int64_t> indices;
    for (const Item& item : items) {
      aligned[item.param].numel = item.numel;
      indices.push_back(item.param);
      owned.push_back(item.param);
      costs.push_back(item.cost);
    }
    for (BucketPlan& bucket : fill_buckets(aligned, indices, rule))
      buckets.push_back(std::move(bucket));
  }
  const std::vector<int64_t> owners = assign_owners(costs, loads);
  std::vector<int64_t> owner_of(params.size());
  for (size_t i = 0; i < owned.size(); ++i)
    owner_of[owned[i]] = owners[i];
  for (BucketPlan& bucket : buckets) {
    for (size_t i = 0; i < bucket.params.size(); ++i)
      bucket.numels[i] = params[bucket.params[i]].numel;
    sort_by_owner(bucket, owner_of, rule.alignment);
  }
  return buckets;
}

} // namespace

std::vector<BucketPlan> plan_whole(const std::vector<ParamSpec>& params, int64_t world_size, const FillRule& rule) {
  std::map<int64_t, Items> by_kind;
  for (int64_t i = static_cast<int64_t>(params.size()) - 1; i >= 0; --i)
    if (params[i].whole_cost)
      by_kind[params[i].kind].push_back({i, round_up(params[i].numel, rule.alignment),
                                         params[i].numel ? *params[i].whole_cost : 0}); // no rank steps nothing

  std::vector<Slices> sliced;
  std::vector<Items> others;
  for (const auto& [kind, items] : by_kind) {
    const int64_t item_bytes = params[items[0].param].item_bytes;
    std::vector<Slices> buckets = in_slices(kind, items, world_size, rule, item_bytes);
    if (is_within_limit(buckets, rule, item_bytes)) {
      std::move(buckets.begin(), buckets.end(), std::back_inserter(sliced));
    } else {
      others.push_back(items);
    }
  }
  const std::vector<int64_t> loads = balance(sliced, world_size);

  std::vector<BucketPlan> plans;
  for (const Slices& slices : sliced)
    plans.push_back(lay_out(slices, params));
  for (BucketPlan& bucket : by_owners(params, others, loads, rule))
    plans.push_back(std::move(bucket));
  return plans;
}

} // namespace zeroopt
