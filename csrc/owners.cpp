#include "owners.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <optional>
#include <queue>
#include <set>
#include <utility>

namespace zeroopt {
namespace {

constexpr int64_t kPrecision = 4096; // the search ends when it knows the load to one in so many

using Owners = std::vector<int64_t>;
using Place = std::pair<int64_t, int64_t>; // load or room of a rank, and its index

struct Assignment {
  Owners owners;
  int64_t most; ///< to do for any rank
};

std::vector<size_t> costliest_first(const std::vector<int64_t>& costs) {
  std::vector<size_t> order(costs.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });
  return order;
}

Assignment to_least_loaded(const std::vector<int64_t>& costs, const std::vector<int64_t>& loads,
                           const std::vector<size_t>& order) {
  std::priority_queue<Place, std::vector<Place>, std::greater<Place>> ranks;
  for (size_t rank = 0; rank < loads.size(); ++rank)
    ranks.push({loads[rank], static_cast<int64_t>(rank)});
  Assignment result{Owners(costs.size()), *std::max_element(loads.begin(), loads.end())};
  for (const size_t param : order) {
    auto [load, rank] = ranks.top();
    ranks.pop();
    result.owners[param] = rank;
    result.most = std::max(result.most, load + costs[param]);
    ranks.push({load + costs[param], rank});
  }
  return result;
}

/// Each into the rank that it leaves the least room, of those in which it fits; nothing where one fits nowhere.
std::optional<Owners> fit(const std::vector<int64_t>& costs, const std::vector<int64_t>& loads,
                          const std::vector<size_t>& order, int64_t capacity) {
  std::set<Place> rooms;
  for (size_t rank = 0; rank < loads.size(); ++rank)
    rooms.insert({capacity - loads[rank], static_cast<int64_t>(rank)});
  Owners owners(costs.size());
  for (const size_t param : order) {
    const auto found = rooms.lower_bound({costs[param], 0});
    if (found == rooms.end()) return std::nullopt;
    const auto [room, rank] = *found;
    owners[param] = rank;
    rooms.erase(found);
    rooms.insert({room - costs[param], rank});
  }
  return owners;
}

} // namespace

std::vector<int64_t> assign_owners(const std::vector<int64_t>& costs, const std::vector<int64_t>& loads) {
  const std::vector<size_t> order = costliest_first(costs);
  Assignment best = to_least_loaded(costs, loads, order);
  const int64_t total =
      std::accumulate(costs.begin(), costs.end(), int64_t{0}) + std::accumulate(loads.begin(), loads.end(), int64_t{0});
  const auto num_ranks = static_cast<int64_t>(loads.size());
  int64_t least = std::max(*std::max_element(loads.begin(), loads.end()), (total + num_ranks - 1) / num_ranks);
  if (!order.empty()) least = std::max(least, costs[order.front()]);
  int64_t below = least - 1; // what is known, or taken, to be too little
  while (best.most - below > std::max<int64_t>(1, least / kPrecision)) {
    // The least possible first: where parameters fit that well, nothing is left to look for.
    const int64_t capacity = below < least ? least : below + (best.most - below) / 2;
    if (std::optional<Owners> owners = fit(costs, loads, order, capacity)) {
      best = {std::move(*owners), capacity};
    } else {
      below = capacity;
    }
  }
  return best.owners;
}

} // namespace zeroopt
