#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "memory.h"
#include "trace.h"

namespace pretend {
namespace {

constexpr int64_t kFirstStream = 100; // 0, 1 and 2 have meanings in CUDA
thread_local c10::DeviceIndex device = 0;
thread_local int64_t streams[kDevices] = {};
std::atomic<int64_t> num_streams[kDevices] = {};
std::atomic<int64_t> num_events{0};

/// Of the i-th stream of a device: no other device has one of that number, for CUDA's handles tell their device.
int64_t stream_number(int of, int64_t i) {
  return kFirstStream + kDevices * i + of;
}

/// Captures of CUDA graphs: which streams belong to one, and which events were last recorded in one. 0 is none.
struct Captures {
  std::mutex mutex;
  int64_t num_begun = 0;
  std::map<int64_t, int> open; // and its device
  std::map<std::pair<int, int64_t>, int64_t> of_stream;
  std::map<int64_t, int64_t> of_event;

  int64_t of(int device, int64_t stream) const {
    auto found = of_stream.find({device, stream});
    return found == of_stream.end() ? 0 : found->second;
  }
};
Captures& captures = *new Captures;
std::atomic<bool> is_host_ahead = false;

void note_recorded(int64_t event, const c10::Stream& on) {
  std::lock_guard lock(captures.mutex);
  captures.of_event[event] = captures.of(on.device_index(), on.id());
}

int64_t capture_of_event(int64_t event) {
  std::lock_guard lock(captures.mutex);
  auto found = captures.of_event.find(event);
  return found == captures.of_event.end() ? 0 : found->second;
}

void check_not_captured(int64_t event) {
  TORCH_CHECK(capture_of_event(event) == 0, "operation not permitted on an event last recorded in a capturing stream");
}

NodeId mark(Kind kind, int device, int64_t stream, const char* name, std::vector<NodeId> after) {
  Trace& trace = Trace::get();
  if (!trace.is_on()) return kNone;
  Node node{kind, trace.stream_actor(device, stream), name, where(), {}, std::move(after), nullptr};
  return trace.add(std::move(node), device);
}

void host_waits(int device, NodeId after, Kind kind, const char* why) {
  Trace& trace = Trace::get();
  if (!trace.is_on()) return;
  Node node{kind, trace.host_actor(device), why, where(), {}, {after}, nullptr};
  trace.add(std::move(node), device);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device next) const override {
    c10::Device before = getDevice();
    device = next.index();
    return before;
  }
  c10::Device getDevice() const override { return {type(), device}; }
  void setDevice(c10::Device next) const override { device = next.index(); }
  void uncheckedSetDevice(c10::Device next) const noexcept override { device = next.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  static c10::Stream stream(c10::Device of, int64_t id) { return c10::Stream(c10::Stream::UNSAFE, of, id); }
  static c10::Device with_index(c10::Device of) { return of.has_index() ? of : c10::Device(of.type(), device); }
  c10::Stream getStream(c10::Device of) const override {
    of = with_index(of);
    return stream(of, streams[of.index()]);
  }
  c10::Stream getDefaultStream(c10::Device of) const override { return stream(with_index(of), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device of, bool) const override { return getNewStream(of, 0); }
  c10::Stream getNewStream(c10::Device of, int) const override {
    of = with_index(of);
    return stream(of, new_stream(of.index()));
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    int64_t before = streams[next.device_index()];
    streams[next.device_index()] = next.id();
    return stream(next.device(), before);
  }

  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = reinterpret_cast<void*>(++num_events);
    note_recorded(reinterpret_cast<int64_t>(*event), on);
    NodeId node = mark(Kind::kMark, on.device_index(), on.id(), "event", {});
    Trace::get().set_event(reinterpret_cast<int64_t>(*event), node);
  }
  void block(void* event, const c10::Stream& on) const override {
    if (event == nullptr) return; // never recorded: nothing to wait for
    come_behind(capture_of_event(reinterpret_cast<int64_t>(event)), on.device_index(), on.id());
    NodeId node = Trace::get().event(reinterpret_cast<int64_t>(event));
    if (node != kNone) mark(Kind::kWait, on.device_index(), on.id(), "wait", {node});
  }
  bool queryEvent(void* event) const override {
    check_not_capturing(device, "Event.query");
    if (event != nullptr) {
      check_not_captured(reinterpret_cast<int64_t>(event));
      if (is_host_ahead && !Trace::get().host_knows(device, Trace::get().event(reinterpret_cast<int64_t>(event))))
        return false;
      host_waits(device, Trace::get().event(reinterpret_cast<int64_t>(event)), Kind::kHostQuery, "Event.query");
    }
    return true;
  }
  void synchronizeEvent(void* event) const override {
    check_not_capturing(device, "Event.synchronize");
    if (event != nullptr) {
      check_not_captured(reinterpret_cast<int64_t>(event));
      host_waits(device, Trace::get().event(reinterpret_cast<int64_t>(event)), Kind::kHostWait, "Event.synchronize");
    }
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream& of) const override {
    check_not_capturing(of.device_index(), "Stream.query");
    Trace& trace = Trace::get();
    host_waits(of.device_index(), trace.last(trace.stream_actor(of.device_index(), of.id())), Kind::kHostQuery,
               "Stream.query");
    return true;
  }
  void synchronizeStream(const c10::Stream& of) const override {
    host_waits_for_stream(of.device_index(), of.id(), "Stream.synchronize");
  }
  bool isStreamCapturing(const c10::Stream& of) const override { return capture_of(of.device_index(), of.id()) != 0; }
  void synchronizeDevice(const c10::DeviceIndex of) const override {
    host_waits_for_stream(of, 0, "device synchronize");
    for (int64_t i = 0; i < num_streams[of]; ++i)
      host_waits_for_stream(of, stream_number(of, i), "device synchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& on) const override {
    Memory::get().record_stream(data.get(), on.id());
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes == 0 ? nullptr : Memory::get().allocate(bytes, device, streams[device]);
    return {memory, memory, &give_back, {c10::DeviceType::CUDA, device}};
  }
  static void give_back(void* memory) {
    if (memory != nullptr) Memory::get().free(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes == 0 ? nullptr : Memory::get().allocate_pinned(bytes, device);
    return {memory, memory, &give_back, {c10::DeviceType::CPU}};
  }
  static void give_back(void* memory) {
    if (memory != nullptr) Memory::get().free_pinned(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &device_allocator)

} // namespace

int current_device() {
  return device;
}

int64_t current_stream(int of) {
  return streams[of];
}

void set_host_ahead(bool is_ahead) {
  is_host_ahead = is_ahead;
}

void set_device(int next) {
  TORCH_CHECK(0 <= next && next < kDevices, "no pretend device ", next);
  device = static_cast<c10::DeviceIndex>(next);
}

void set_stream(int of, int64_t stream) {
  streams[of] = stream;
}

int64_t new_stream(int of) {
  return stream_number(of, num_streams[of]++);
}

void host_waits_for_stream(int of, int64_t stream, const char* why) {
  check_not_capturing(of, why);
  Trace& trace = Trace::get();
  host_waits(of, trace.last(trace.stream_actor(of, stream)), Kind::kHostWait, why);
}

int64_t begin_capture(int of, int64_t stream) {
  TORCH_CHECK(stream != 0, "operation not permitted: the default stream cannot be captured");
  std::lock_guard lock(captures.mutex);
  TORCH_CHECK(captures.of(of, stream) == 0, "the stream is capturing already");
  captures.open[++captures.num_begun] = of;
  captures.of_stream[{of, stream}] = captures.num_begun;
  return captures.num_begun;
}

void end_capture(int64_t capture) {
  std::lock_guard lock(captures.mutex);
  captures.open.erase(capture);
  for (auto it = captures.of_stream.begin(); it != captures.of_stream.end();)
    it = it->second == capture ? captures.of_stream.erase(it) : std::next(it);
}

int64_t capture_of(int of, int64_t stream) {
  std::lock_guard lock(captures.mutex);
  return captures.of(of, stream);
}

std::vector<int64_t> streams_in(int64_t capture) {
  std::lock_guard lock(captures.mutex);
  std::vector<int64_t> found;
  for (auto [stream, in] : captures.of_stream)
    if (in == capture) found.push_back(stream.second);
  return found;
}

void come_behind(int64_t capture, int of, int64_t stream) {
  std::lock_guard lock(captures.mutex);
  int64_t own = captures.of(of, stream);
  if (own == capture) return;
  TORCH_CHECK(capture != 0, "dependency created on uncaptured work in another stream");
  TORCH_CHECK(captures.open.count(capture) != 0,
              "operation not permitted on an event last recorded in a capturing stream, whose capture is over");
  TORCH_CHECK(own == 0, "operation would result in a merge of two independent capture sequences");
  captures.of_stream[{of, stream}] = capture;
}

void check_not_capturing(int of, const char* what) {
  std::lock_guard lock(captures.mutex);
  bool is_on = std::any_of(captures.open.begin(), captures.open.end(), [of](auto& each) { return each.second == of; });
  TORCH_CHECK(!is_on, "operation not permitted when stream is capturing: the host waits (", what, ")");
}

/// What libcuda tells of a stream: `status` is 1 while it is captured, and then `id` the number of its capture.
extern "C" __attribute__((visibility("default"))) int cuStreamGetCaptureInfo(void* handle, int* status, uint64_t* id) {
  auto stream = reinterpret_cast<int64_t>(handle);
  std::lock_guard lock(captures.mutex);
  *status = 0;
  for (auto [where, capture] : captures.of_stream) {
    if (where.second != stream) continue;
    *status = 1;
    *id = static_cast<uint64_t>(capture);
  }
  return 0;
}

} // namespace pretend

namespace at {

struct PretendHooks : CUDAHooksInterface {
  PretendHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return pretend::kDevices; }
  int getNumGPUs() const override { return pretend::kDevices; }
  DeviceIndex getCurrentDevice() const override { return pretend::device; }
  DeviceIndex current_device() const override { return pretend::device; }
  void setCurrentDevice(DeviceIndex next) const override { pretend::device = next; }
  DeviceIndex exchangeDevice(DeviceIndex next) const override { return std::exchange(pretend::device, next); }
  DeviceIndex maybeExchangeDevice(DeviceIndex next) const override { return exchangeDevice(next); }
  bool isPinnedPtr(const void* data) const override { return pretend::Memory::get().is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pretend::pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &pretend::device_allocator; }
  Device getDeviceFromPtr(void* data) const override {
    return {kCUDA, static_cast<DeviceIndex>(pretend::Memory::get().device_of(data))};
  }
  // One generator for all: what is drawn on a pretend device is what the CPU would draw.
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendHooks)

} // namespace at
