// Runs a recorded trace again in other orders, which the device would be free to take.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace pretend {

class Replay {
public:
  /// Of the trace as it is. It may not be recorded on any more.
  ///
  /// left_out: nodes that wait for nothing, as if the program had forgotten to have them wait.
  explicit Replay(const std::set<int64_t>& left_out);

  /// Run all nodes from the memory there was at the beginning, in an order drawn by a seed. Returns what differs from
  /// the recording: what the host has read, and what memory holds in the end. Throws where a node cannot run at all.
  ///
  /// Each actor has a priority, and the most urgent one that may go on does; now and then one is given another
  /// priority. So some actors are far behind others, for long. (Burckhardt et al., "A randomized scheduler with
  /// probabilistic guarantees of finding bugs", 2010.)
  std::vector<std::string> run(uint64_t seed);

private:
  std::vector<std::vector<int64_t>> of_actor_; // its nodes in order
  std::vector<std::vector<int64_t>> followers_;
  std::vector<int> num_before_;
};

} // namespace pretend
