// What torch's DistributedDataParallel asks of a device's backend: a timer. This one tells what the host has taken.
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

namespace c10d {
namespace {

struct HostTimer final : Timer {
  explicit HostTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    auto begun = getTimestamp(start), ended = getTimestamp(end);
    if (!begun || !ended) return std::nullopt;
    return *ended - *begun;
  }
};

C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, HostTimer)

} // namespace
} // namespace c10d
