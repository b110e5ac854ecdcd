// Memory of the pretend devices, and the host's pinned memory: plain CPU memory that is handed out as CUDA's caching
// allocators do.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace pretend {

/// A stretch of memory of one device that belongs to one stream: whoever gets it next launches on that stream.
struct Block {
  uintptr_t base;
  size_t bytes;
  int device;
  int64_t stream;
  bool is_live = false;
  std::set<int64_t> users; // other streams, by record_stream
  std::string where;
};

/// The host's pinned memory. `seen` is what it held when a node was last recorded.
struct PinnedBlock {
  uintptr_t base;
  size_t bytes;
  int device; // of the rank that has made it
  bool is_live = true;
  std::vector<uint8_t> seen;
};

class Memory {
public:
  static Memory& get();

  void* allocate(size_t bytes, int device, int64_t stream);
  void free(void* base);
  void record_stream(void* base, int64_t stream);
  void* allocate_pinned(size_t bytes, int device);
  void free_pinned(void* base);
  bool is_pinned(const void* address) const;
  /// The device whose memory it is, or -1.
  int device_of(const void* address) const;
  void note_seen(uintptr_t begin, uintptr_t end);

  /// Memory that nobody uses is given back: each order would have to restore it.
  void begin();
  /// Memory that nobody uses is handed out to nobody until `begin`.
  void keep_idle();
  /// What there is now is what `restore` brings back.
  void snapshot();
  void restore();
  void note_result();
  /// The live blocks, and pinned ones, whose bits are not those of `note_result`.
  std::vector<std::string> differences() const;

  void reset_peak(int device);
  int64_t peak_bytes(int device) const;
  /// With what has been freed and the host does not know yet to be out of use.
  int64_t live_bytes(int device) const;

  std::map<uintptr_t, PinnedBlock>& pinned() { return pinned_; }

private:
  const Block* find(const void* address) const;

  std::map<uintptr_t, Block> blocks_;
  std::multimap<std::tuple<int, int64_t, size_t>, uintptr_t> idle_;
  std::vector<uintptr_t> limbo_; // freed, while a stream that was recorded may still use them
  std::map<uintptr_t, PinnedBlock> pinned_;
  std::map<uintptr_t, std::vector<uint8_t>> before_, pinned_before_, result_, pinned_result_;
  std::map<int, int64_t> live_, peak_;
};

constexpr uint8_t kPoison = 0xFF; // NaN in every floating dtype

} // namespace pretend
