#include "memory.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "trace.h"

namespace pretend {
namespace {

constexpr size_t kGranule = 512; // as of CUDA's allocator
constexpr uint8_t kFence = 0xA7; // behind each block

size_t rounded(size_t bytes) {
  return std::max(kGranule, (bytes + kGranule - 1) / kGranule * kGranule);
}

uintptr_t fresh(size_t bytes) {
  void* memory = std::aligned_alloc(kGranule, bytes + kGranule);
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, kPoison, bytes);
  std::memset(static_cast<uint8_t*>(memory) + bytes, kFence, kGranule);
  return reinterpret_cast<uintptr_t>(memory);
}

/// Whether nobody has written past the end of a block.
bool is_fenced(uintptr_t base, size_t bytes) {
  const auto* fence = reinterpret_cast<const uint8_t*>(base) + bytes;
  return std::all_of(fence, fence + kGranule, [](uint8_t byte) { return byte == kFence; });
}

std::vector<uint8_t> copy_of(uintptr_t base, size_t bytes) {
  const auto* begin = reinterpret_cast<const uint8_t*>(base);
  return {begin, begin + bytes};
}

} // namespace

Memory& Memory::get() {
  static auto* memory = new Memory;
  return *memory;
}

void* Memory::allocate(size_t bytes, int device, int64_t stream) {
  std::string from = Trace::get().is_on() ? where() : "before the trace";
  std::lock_guard lock(Trace::get().mutex());
  size_t size = rounded(bytes);
  uintptr_t base;
  // The block that was given back last: what is wrong about its reuse shows soonest.
  auto [first, end] = idle_.equal_range({device, stream, size});
  if (first != end) {
    base = std::prev(end)->second;
    idle_.erase(std::prev(end));
  } else {
    base = fresh(size);
    blocks_[base] = {base, size, device, stream, true, {}, ""};
  }
  Block& block = blocks_[base];
  block.is_live = true;
  block.users.clear();
  block.where = from;
  live_[device] += static_cast<int64_t>(size);
  peak_[device] = std::max(peak_[device], live_[device]);
  return reinterpret_cast<void*>(base);
}

void Memory::free(void* address) {
  Trace& trace = Trace::get();
  std::string from = trace.is_on() ? where() : "";
  std::lock_guard lock(trace.mutex());
  auto base = reinterpret_cast<uintptr_t>(address);
  Block& block = blocks_.at(base);
  block.is_live = false;
  size_t bytes = block.bytes;
  Action poison = [base, bytes] {
    std::memset(reinterpret_cast<void*>(base), kPoison, bytes);
    return true;
  };
  Node node{Kind::kFree, 0, "free", from + ", allocated at " + block.where, {{base, base + bytes, true}}, {}, poison};
  int device = block.device;
  if (block.users.empty()) {
    live_[device] -= static_cast<int64_t>(bytes);
    idle_.emplace(std::make_tuple(block.device, block.stream, bytes), base);
    node.actor = trace.stream_actor(block.device, block.stream);
  } else {
    // The allocator keeps it until the host has seen that the other streams are through. No stream waits for that.
    limbo_.push_back(base);
    node.actor = trace.stream_actor(block.device, -1 - static_cast<int64_t>(limbo_.size()));
    for (int64_t stream : block.users)
      node.after.push_back(trace.last(trace.stream_actor(block.device, stream)));
    node.after.push_back(trace.last(trace.stream_actor(block.device, block.stream)));
    trace.run_when_known(node.after, [this, device, bytes] {
      live_[device] -= static_cast<int64_t>(bytes);
      return true;
    });
  }
  trace.add(std::move(node), block.device);
  poison();
}

void Memory::record_stream(void* base, int64_t stream) {
  std::lock_guard lock(Trace::get().mutex());
  auto found = blocks_.find(reinterpret_cast<uintptr_t>(base));
  // As with PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync; torch's own allocator leaves alone what is not its own.
  if (base != nullptr) TORCH_INTERNAL_ASSERT(found != blocks_.end(), "ptr not found in ptr_info");
  if (base != nullptr && found->second.stream != stream) found->second.users.insert(stream);
}

void* Memory::allocate_pinned(size_t bytes, int device) {
  std::lock_guard lock(Trace::get().mutex());
  size_t size = rounded(bytes);
  uintptr_t base = fresh(size);
  pinned_[base] = {base, size, device, true, copy_of(base, size)};
  return reinterpret_cast<void*>(base);
}

void Memory::free_pinned(void* base) {
  std::lock_guard lock(Trace::get().mutex());
  // Handed out to nobody else: copies may still read it.
  pinned_.at(reinterpret_cast<uintptr_t>(base)).is_live = false;
}

bool Memory::is_pinned(const void* address) const {
  std::lock_guard lock(Trace::get().mutex());
  auto at = reinterpret_cast<uintptr_t>(address);
  auto next = pinned_.upper_bound(at);
  if (next == pinned_.begin()) return false;
  const PinnedBlock& block = std::prev(next)->second;
  return at < block.base + block.bytes;
}

const Block* Memory::find(const void* address) const {
  auto at = reinterpret_cast<uintptr_t>(address);
  auto next = blocks_.upper_bound(at);
  if (next == blocks_.begin()) return nullptr;
  const Block& block = std::prev(next)->second;
  return at < block.base + block.bytes ? &block : nullptr;
}

int Memory::device_of(const void* address) const {
  std::lock_guard lock(Trace::get().mutex());
  const Block* block = find(address);
  return block == nullptr ? -1 : block->device;
}

void Memory::note_seen(uintptr_t begin, uintptr_t end) {
  for (auto& [base, block] : pinned_) {
    if (base <= begin && end <= base + block.bytes)
      std::memcpy(block.seen.data() + (begin - base), reinterpret_cast<const void*>(begin), end - begin);
  }
}

void Memory::begin() {
  limbo_.clear();
  // A block that was written past its end is kept, so that `differences` tells of it.
  idle_.clear();
  for (auto it = blocks_.begin(); it != blocks_.end();) {
    if (!it->second.is_live && is_fenced(it->first, it->second.bytes)) {
      std::free(reinterpret_cast<void*>(it->first));
      it = blocks_.erase(it);
    } else {
      ++it;
    }
  }
  for (auto it = pinned_.begin(); it != pinned_.end();) {
    if (it->second.is_live) {
      it->second.seen = copy_of(it->first, it->second.bytes);
      ++it;
    } else {
      std::free(reinterpret_cast<void*>(it->first));
      it = pinned_.erase(it);
    }
  }
}

void Memory::keep_idle() {
  std::lock_guard lock(Trace::get().mutex());
  idle_.clear();
}

void Memory::snapshot() {
  before_.clear();
  pinned_before_.clear();
  for (const auto& [base, block] : blocks_)
    if (block.is_live) before_[base] = copy_of(base, block.bytes);
  for (const auto& [base, block] : pinned_)
    pinned_before_[base] = copy_of(base, block.bytes);
}

void Memory::restore() {
  auto bring_back = [](auto& saved, uintptr_t base, size_t bytes) {
    auto found = saved.find(base);
    if (found == saved.end())
      std::memset(reinterpret_cast<void*>(base), kPoison, bytes);
    else
      std::memcpy(reinterpret_cast<void*>(base), found->second.data(), bytes);
  };
  for (const auto& [base, block] : blocks_)
    bring_back(before_, base, block.bytes);
  for (const auto& [base, block] : pinned_)
    bring_back(pinned_before_, base, block.bytes);
}

void Memory::note_result() {
  result_.clear();
  for (const auto& [base, block] : blocks_)
    if (block.is_live) result_[base] = copy_of(base, block.bytes);
  pinned_result_.clear();
  for (const auto& [base, block] : pinned_)
    if (block.is_live) pinned_result_[base] = copy_of(base, block.bytes);
}

std::vector<std::string> Memory::differences() const {
  std::vector<std::string> places;
  for (const auto& [base, block] : blocks_)
    if (!is_fenced(base, block.bytes)) places.push_back("what lies behind memory allocated at " + block.where);
  for (const auto& [base, bytes] : result_) {
    if (std::memcmp(reinterpret_cast<const void*>(base), bytes.data(), bytes.size()) != 0) {
      const Block& block = blocks_.at(base);
      size_t first = 0;
      while (reinterpret_cast<const uint8_t*>(base)[first] == bytes[first])
        ++first;
      places.push_back("byte " + std::to_string(first) + " of " + std::to_string(block.bytes) +
                       " bytes of cuda:" + std::to_string(block.device) + ", allocated at " + block.where);
    }
  }
  for (const auto& [base, bytes] : pinned_result_)
    if (std::memcmp(reinterpret_cast<const void*>(base), bytes.data(), bytes.size()) != 0)
      places.push_back("pinned memory");
  return places;
}

void Memory::reset_peak(int device) {
  std::lock_guard lock(Trace::get().mutex());
  peak_[device] = live_[device];
}

int64_t Memory::peak_bytes(int device) const {
  std::lock_guard lock(Trace::get().mutex());
  auto found = peak_.find(device);
  return found == peak_.end() ? 0 : found->second;
}

int64_t Memory::live_bytes(int device) const {
  std::lock_guard lock(Trace::get().mutex());
  auto found = live_.find(device);
  return found == live_.end() ? 0 : found->second;
}

} // namespace pretend
