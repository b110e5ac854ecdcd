// What a program has told the device to do, and what of it has to come before what.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace pretend {

/// Bytes that a node reads, or writes.
struct Range {
  uintptr_t begin, end;
  bool is_write;
};

/// Does a node's work once more. Returns whether the host reads what it has read when the node was recorded.
using Action = std::function<bool()>;

enum class Kind {
  kLaunch,     // of a kernel
  kCopy,       // by a copy engine
  kCollective, // of all ranks together
  kMark,       // an event that is recorded, or the begin or end of a collective
  kWait,       // of a stream for an event
  kHostWait,   // of the host for a stream or an event
  kHostQuery,  // the host is told that an event has come
  kHostWrite,  // the host writes pinned memory
  kFree,       // memory may be used by others from here on, in its stream's order
};

using NodeId = int64_t;
constexpr NodeId kNone = -1;

/// One thing that an actor does. Actors do their nodes in order; across actors only `after` and `launched_after` order
/// them.
struct Node {
  Kind kind;
  int actor;
  std::string name, where;
  std::vector<Range> ranges;
  std::vector<NodeId> after; // what it waits for
  Action action;
  NodeId launched_after = kNone; // what its host had waited for by then
  std::vector<int64_t> clock;    // by actor, how many of its nodes have come before this one is through
};

/// The nodes since `begin`. An actor is a stream, or a rank's host, which launches nodes on streams.
///
/// Nodes run when they are recorded, in program order, except that what writes pinned memory does so when the host
/// waits for it. `Replay` runs them again in other orders.
class Trace {
public:
  static Trace& get();

  void begin();
  void end();
  bool is_on() const { return is_on_; }

  int stream_actor(int device, int64_t stream);
  /// The host that launches on a device. Each device has one of its own, unless `share_host` says otherwise.
  int host_actor(int device);
  void share_host(int device, int with_device);
  /// The device after which the host of a device is called.
  int host_of(int device) const;
  std::vector<std::string> actors() const;

  /// Record a node; a stream's comes after what its host has waited for so far. Its action is not run.
  NodeId add(Node node, int host_device);
  /// Run an action when the host of some nodes may know that all of them are through: it has waited for them.
  void run_when_known(std::vector<NodeId> nodes, Action action);

  /// Whether the host of a device has waited for what comes behind a node.
  bool host_knows(int device, NodeId node);

  /// The last node of an actor, or kNone.
  NodeId last(int actor) const;

  NodeId event(int64_t event) const;
  void set_event(int64_t event, NodeId node);

  const std::deque<Node>& nodes() const { return nodes_; }

  /// Serialises what threads record. Nobody asks for Python's lock while holding it.
  std::recursive_mutex& mutex() const { return mutex_; }

private:
  std::vector<int64_t> clock_of(const Node& node) const;
  void run_known(const Node& host_node);
  void note_host_writes(int host_device);

  mutable std::recursive_mutex mutex_;
  std::atomic<bool> is_on_ = false;
  std::deque<Node> nodes_;
  std::vector<std::string> names_;
  std::map<std::pair<int, int64_t>, int> streams_;
  std::map<int, int> hosts_, shared_;
  std::vector<NodeId> last_;
  std::map<int64_t, NodeId> events_;
  std::vector<std::pair<std::vector<NodeId>, Action>> unknown_;
};

/// Where in Python a node comes from: the innermost lines of the package, or of whoever called it. Takes Python's lock.
std::string where();

} // namespace pretend
