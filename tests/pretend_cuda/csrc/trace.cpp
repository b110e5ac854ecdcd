#include "trace.h"

#include <algorithm>
#include <cstring>

#include "memory.h"

namespace pretend {

Trace& Trace::get() {
  static auto* trace = new Trace; // threads of autograd may outlive whatever is destroyed at exit
  return *trace;
}

void Trace::begin() {
  // Dropping actions takes Python's lock, so that comes when ours has been given back.
  std::deque<Node> nodes;
  std::vector<std::pair<std::vector<NodeId>, Action>> unknown;
  std::lock_guard lock(mutex_);
  nodes_.swap(nodes);
  events_.clear();
  unknown_.swap(unknown);
  names_.clear(); // a clock has a number for each actor, of which every communicator and every free adds one
  streams_.clear();
  hosts_.clear();
  last_.clear();
  Memory::get().begin();
  Memory::get().snapshot();
  is_on_ = true;
}

void Trace::end() {
  std::lock_guard lock(mutex_);
  for (auto& [nodes, action] : unknown_)
    action();
  unknown_.clear();
  Memory::get().note_result();
  is_on_ = false;
}

int Trace::stream_actor(int device, int64_t stream) {
  std::lock_guard lock(mutex_);
  auto [found, is_new] = streams_.try_emplace({device, stream}, static_cast<int>(names_.size()));
  if (is_new) {
    names_.push_back((stream == 0 ? "default stream" : "stream " + std::to_string(stream)) +
                     " of cuda:" + std::to_string(device));
    last_.push_back(kNone);
  }
  return found->second;
}

int Trace::host_actor(int device) {
  std::lock_guard lock(mutex_);
  device = host_of(device);
  auto [found, is_new] = hosts_.try_emplace(device, static_cast<int>(names_.size()));
  if (is_new) {
    names_.push_back("host of cuda:" + std::to_string(device));
    last_.push_back(kNone);
  }
  return found->second;
}

int Trace::host_of(int device) const {
  std::lock_guard lock(mutex_);
  auto other = shared_.find(device);
  return other == shared_.end() ? device : other->second;
}

void Trace::share_host(int device, int with_device) {
  std::lock_guard lock(mutex_);
  shared_[device] = with_device;
}

std::vector<std::string> Trace::actors() const {
  std::lock_guard lock(mutex_);
  return names_;
}

std::vector<int64_t> Trace::clock_of(const Node& node) const {
  std::vector<int64_t> clock(names_.size(), 0);
  auto join = [&](NodeId id) {
    if (id == kNone) return;
    const auto& other = nodes_[id].clock;
    for (size_t i = 0; i < other.size(); ++i)
      clock[i] = std::max(clock[i], other[i]);
  };
  join(last_[node.actor]);
  join(node.launched_after);
  for (NodeId id : node.after)
    join(id);
  ++clock[node.actor];
  return clock;
}

NodeId Trace::add(Node node, int host_device) {
  std::lock_guard lock(mutex_);
  if (!is_on_) return kNone;
  int host = host_actor(host_device);
  if (node.kind != Kind::kHostWrite) note_host_writes(host_device);
  if (node.actor != host) node.launched_after = last_[host];
  node.after.erase(std::remove(node.after.begin(), node.after.end(), kNone), node.after.end());
  node.clock = clock_of(node);
  NodeId id = static_cast<NodeId>(nodes_.size());
  last_[node.actor] = id;
  nodes_.push_back(std::move(node));
  if (nodes_.back().actor == host) run_known(nodes_.back());
  return id;
}

void Trace::run_when_known(std::vector<NodeId> nodes, Action action) {
  std::lock_guard lock(mutex_);
  nodes.erase(std::remove(nodes.begin(), nodes.end(), kNone), nodes.end());
  if (nodes.empty())
    action();
  else
    unknown_.emplace_back(std::move(nodes), std::move(action));
}

void Trace::run_known(const Node& host_node) {
  auto is_known = [&](NodeId id) {
    const Node& node = nodes_[id];
    size_t actor = node.actor;
    return actor < host_node.clock.size() && node.clock[actor] <= host_node.clock[actor];
  };
  std::vector<std::pair<std::vector<NodeId>, Action>> left;
  for (auto& [nodes, action] : unknown_) {
    if (std::all_of(nodes.begin(), nodes.end(), is_known))
      action();
    else
      left.emplace_back(std::move(nodes), std::move(action));
  }
  unknown_ = std::move(left);
}

/// Nobody tells when the host writes pinned memory, so whatever has changed there since the last node becomes one.
void Trace::note_host_writes(int host_device) {
  for (auto& [base, block] : Memory::get().pinned()) {
    if (!block.is_live || host_of(block.device) != host_of(host_device)) continue;
    const auto* now = reinterpret_cast<const uint8_t*>(base);
    auto first = std::mismatch(block.seen.begin(), block.seen.end(), now).first - block.seen.begin();
    if (static_cast<size_t>(first) == block.bytes) continue;
    auto last = static_cast<ptrdiff_t>(block.bytes);
    while (block.seen[last - 1] == now[last - 1])
      --last;
    std::vector<uint8_t> bytes(now + first, now + last);
    std::copy(bytes.begin(), bytes.end(), block.seen.begin() + first);
    uintptr_t begin = base + first;
    Action write = [begin, bytes] {
      std::memcpy(reinterpret_cast<void*>(begin), bytes.data(), bytes.size());
      return true;
    };
    Node node{Kind::kHostWrite,
              host_actor(host_device),
              "host writes pinned memory",
              "",
              {{begin, begin + bytes.size(), true}},
              {},
              std::move(write)};
    add(std::move(node), host_device);
  }
}

bool Trace::host_knows(int device, NodeId id) {
  std::lock_guard lock(mutex_);
  if (id == kNone) return true;
  NodeId host = last_[host_actor(device)];
  if (host == kNone) return false;
  const auto& clock = nodes_[host].clock;
  size_t actor = nodes_[id].actor;
  return actor < clock.size() && nodes_[id].clock[actor] <= clock[actor];
}

NodeId Trace::last(int actor) const {
  std::lock_guard lock(mutex_);
  return last_[actor];
}

NodeId Trace::event(int64_t event) const {
  std::lock_guard lock(mutex_);
  auto found = events_.find(event);
  return found == events_.end() ? kNone : found->second;
}

void Trace::set_event(int64_t event, NodeId node) {
  std::lock_guard lock(mutex_);
  events_[event] = node;
}

} // namespace pretend
