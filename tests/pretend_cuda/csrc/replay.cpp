#include "replay.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>

#include "memory.h"
#include "trace.h"

namespace pretend {

Replay::Replay(const std::set<NodeId>& left_out) {
  const Trace& trace = Trace::get();
  const auto& nodes = trace.nodes();
  of_actor_.resize(trace.actors().size());
  followers_.resize(nodes.size());
  num_before_.resize(nodes.size(), 0);
  auto order = [&](int64_t before, int64_t after) {
    followers_[before].push_back(after);
    ++num_before_[after];
  };
  for (size_t id = 0; id < nodes.size(); ++id) {
    auto& row = of_actor_[nodes[id].actor];
    if (!row.empty()) order(row.back(), static_cast<int64_t>(id));
    row.push_back(static_cast<int64_t>(id));
    if (nodes[id].launched_after != kNone) order(nodes[id].launched_after, static_cast<int64_t>(id));
    if (left_out.count(static_cast<NodeId>(id)) != 0) continue;
    for (NodeId before : nodes[id].after)
      order(before, static_cast<int64_t>(id));
  }
  // Actors that were only asked for have nothing to do here.
  of_actor_.erase(std::remove_if(of_actor_.begin(), of_actor_.end(), [](const auto& row) { return row.empty(); }),
                  of_actor_.end());
}

std::vector<std::string> Replay::run(uint64_t seed) {
  const auto& nodes = Trace::get().nodes();
  std::mt19937_64 random(seed);
  std::vector<int> priority(of_actor_.size());
  std::iota(priority.begin(), priority.end(), 0);
  std::shuffle(priority.begin(), priority.end(), random);
  constexpr double kChances[] = {0.0, 0.01, 0.05, 0.3};
  std::bernoulli_distribution changes(kChances[random() % 4]);
  std::vector<int> waits_for = num_before_;
  std::vector<size_t> next(of_actor_.size(), 0);
  std::vector<std::string> wrong;
  Memory::get().restore();
  for (size_t done = 0; done < nodes.size(); ++done) {
    if (changes(random)) std::swap(priority[random() % priority.size()], priority[random() % priority.size()]);
    int chosen = -1;
    for (size_t actor = 0; actor < of_actor_.size(); ++actor) {
      const auto& row = of_actor_[actor];
      bool is_ready = next[actor] < row.size() && waits_for[row[next[actor]]] == 0;
      if (is_ready && (chosen < 0 || priority[actor] > priority[chosen])) chosen = static_cast<int>(actor);
    }
    if (chosen < 0) throw std::logic_error("no node can run: the trace has a circle");
    int64_t id = of_actor_[chosen][next[chosen]++];
    const Node& node = nodes[id];
    bool is_same = false;
    try {
      is_same = !node.action || node.action();
    } catch (const std::exception& error) {
      wrong.push_back(node.name + " at " + node.where + " failed: " + error.what());
      break; // what follows would compute with what it has not written
    }
    if (!is_same) wrong.push_back("the host has read something else: " + node.name + " at " + node.where);
    for (int64_t follower : followers_[id])
      --waits_for[follower];
  }
  for (std::string& place : Memory::get().differences())
    wrong.push_back("in the end there is something else in " + place);
  return wrong;
}

} // namespace pretend
