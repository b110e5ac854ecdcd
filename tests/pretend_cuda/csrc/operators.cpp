// torch's operators on pretend devices: each runs its CPU kernel on the same memory, and is recorded with the stream
// that it would be launched on and the bytes that it reads and writes.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/Resize.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <set>

#include "device.h"
#include "memory.h"
#include "trace.h"

namespace pretend {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

/// The same elements, as a tensor on the CPU.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  auto options = tensor.options().device(c10::kCPU).requires_grad(false);
  if (tensor.storage().nbytes() == 0 || tensor.numel() == 0) return at::empty(tensor.sizes(), options);
  Tensor alias = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [](void*) {}, options);
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  return alias;
}

Range range_of(const Tensor& tensor, bool is_write) {
  auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    last += (tensor.size(i) - 1) * tensor.stride(i);
  return {begin, begin + (last + 1) * tensor.itemsize(), is_write};
}

NodeId record(Kind kind, int device, const std::string& name, std::vector<Range> ranges, Action action) {
  Trace& trace = Trace::get();
  if (!trace.is_on()) return kNone;
  Node node{kind,
            trace.stream_actor(device, current_stream(device)),
            name,
            where(),
            std::move(ranges),
            {},
            std::move(action)};
  return trace.add(std::move(node), device);
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.nbytes() == b.nbytes() && std::memcmp(a.data_ptr(), b.data_ptr(), a.nbytes()) == 0;
}

// --- Every operator that has no kernel of its own below.

at::Generator generator() {
  return at::detail::getDefaultCPUGenerator();
}

/// A call of an operator, with its tensors on the CPU.
class Call {
public:
  Call(const c10::OperatorHandle& op, Stack* stack) : op_(op), stack_(stack), arguments_(op.schema().arguments()) {
    first_ = stack->size() - arguments_.size();
    for (size_t i = 0; i < arguments_.size(); ++i)
      inputs_.push_back(translate((*stack)[first_ + i], is_written(arguments_[i])));
    TORCH_CHECK(device_ >= 0, "no tensor or device of cuda in a call of ", name());
  }

  void run() {
    c10::DeviceGuard guard(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device_)));
    std::optional<at::Tensor> random_state;
    if (is_random()) random_state = generator().get_state();
    Stack results = run_on_cpu(op_, inputs_);
    std::vector<Made> made;
    std::vector<IValue> scalars;
    Stack returned;
    for (size_t i = 0; i < results.size(); ++i)
      returned.push_back(take_result(i, results[i], made, scalars));
    follow_resized();
    record_with(std::move(made), scalars, std::move(random_state));
    stack_->resize(first_);
    for (IValue& value : returned)
      stack_->push_back(std::move(value));
  }

private:
  /// A tensor that a call has made: which one of its results, and the device's memory for it, as the CPU sees it.
  struct Made {
    size_t result, index;
    Tensor kept;
  };

  std::string name() const { return c10::toString(op_.operator_name()); }

  static bool is_written(const c10::Argument& argument) {
    return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  }

  bool is_random() const { return op_.hasTag(at::Tag::nondeterministic_seeded); }

  /// An argument from the host is read now, whenever the call runs.
  static Tensor value_of(const Tensor& tensor) {
    Tensor value = tensor.clone();
    value.unsafeGetTensorImpl()->set_wrapped_number(tensor.unsafeGetTensorImpl()->is_wrapped_number());
    return value;
  }

  Tensor translate_tensor(const Tensor& tensor, bool written) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) return written ? tensor : value_of(tensor);
    TORCH_CHECK(device_ < 0 || device_ == tensor.device().index(), "expected all tensors of ", name(),
                " on one device, got cuda:", device_, " and ", tensor.device());
    device_ = tensor.device().index();
    if (tensor.numel() > 0) ranges_.push_back(range_of(tensor, written));
    Tensor alias = on_cpu(tensor);
    if (written) written_.emplace_back(tensor, alias);
    return alias;
  }

  IValue translate(const IValue& value, bool written) {
    if (value.isTensor()) return translate_tensor(value.toTensor(), written);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector())
        list.push_back(translate_tensor(tensor, written));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? std::optional(translate_tensor(*tensor, written)) : std::nullopt);
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      if (device_ < 0) device_ = value.toDevice().has_index() ? value.toDevice().index() : current_device();
      return c10::Device(c10::kCPU);
    }
    return value;
  }

  static Stack run_on_cpu(const c10::OperatorHandle& op, Stack stack) {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
    return stack;
  }

  IValue take_result(size_t i, const IValue& result, std::vector<Made>& made, std::vector<IValue>& scalars) {
    if (result.isTensor()) return take_tensor({i, 0, {}}, result.toTensor(), made);
    if (result.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : result.toTensorVector())
        list.push_back(take_tensor({i, list.size(), {}}, tensor, made));
      return list;
    }
    scalars.push_back(result);
    return result;
  }

  Tensor take_tensor(Made place, const Tensor& result, std::vector<Made>& made) {
    if (!result.defined()) return result;
    for (auto& [tensor, alias] : written_)
      if (alias.is_same(result)) return tensor;
    const auto& alias_info = op_.schema().returns()[place.result].alias_info();
    TORCH_CHECK(alias_info == nullptr, name(), " gives a view, and has no kernel for pretend devices");
    Tensor kept = at::empty_strided(result.sizes(), result.strides(), result.options().device(c10::kCUDA, device_));
    if (result.numel() > 0) {
      on_cpu(kept).copy_(result);
      ranges_.push_back(range_of(kept, true));
      place.kept = on_cpu(kept);
      made.push_back(std::move(place));
    }
    return kept;
  }

  /// An output that was empty has been given its size, on the CPU.
  void follow_resized() {
    for (auto& [tensor, alias] : written_) {
      if (tensor.sizes() == alias.sizes()) continue;
      tensor.resize_(alias.sizes());
      if (alias.numel() == 0) continue;
      on_cpu(tensor).copy_(alias);
      ranges_.push_back(range_of(tensor, true));
      resized_.emplace_back(alias, on_cpu(tensor));
    }
  }

  void record_with(std::vector<Made> made, const std::vector<IValue>& scalars, std::optional<Tensor> random_state) {
    bool host_waits = !scalars.empty() || needs_host();
    if (host_waits) check_not_capturing(device_, name().c_str());
    if (!Trace::get().is_on()) return;
    Action action = [op = op_, inputs = std::move(inputs_), made = std::move(made), scalars,
                     resized = std::move(resized_), random_state = std::move(random_state)] {
      std::optional<Tensor> later;
      if (random_state) {
        later = generator().get_state();
        generator().set_state(*random_state);
      }
      Stack results = run_on_cpu(op, inputs);
      if (later) generator().set_state(*later);
      for (const Made& place : made) {
        const IValue& result = results[place.result];
        Tensor tensor = result.isTensor() ? result.toTensor() : result.toTensorList().get(place.index);
        if (tensor.sizes() != place.kept.sizes()) return false;
        place.kept.copy_(tensor);
      }
      for (const auto& [alias, kept] : resized)
        kept.copy_(alias);
      size_t next = 0;
      for (const IValue& result : results)
        if (!result.isTensor() && !result.isTensorList() && result != scalars[next++]) return false;
      return true;
    };
    record(Kind::kLaunch, device_, name(), std::move(ranges_), std::move(action));
    if (host_waits) host_waits_for_stream(device_, current_stream(device_), name().c_str());
  }

  /// How large its result is, the host has to ask the device.
  bool needs_host() const {
    static const std::set<std::string> names = {"aten::nonzero",    "aten::masked_select",      "aten::_unique2",
                                                "aten::unique_dim", "aten::unique_consecutive", "aten::bincount"};
    return names.count(op_.schema().name()) != 0 || indexes_by_mask();
  }

  bool indexes_by_mask() const {
    const std::string& operator_name = op_.schema().name();
    if (operator_name.rfind("aten::index", 0) != 0 && operator_name.rfind("aten::_index_put", 0) != 0) return false;
    for (size_t i = 0; i < arguments_.size(); ++i) {
      if (!inputs_[i].isOptionalTensorList()) continue;
      for (const std::optional<Tensor>& index : inputs_[i].toOptionalTensorVector())
        if (index && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte)) return true;
    }
    return false;
  }

  c10::OperatorHandle op_;
  Stack* stack_;
  const std::vector<c10::Argument>& arguments_;
  size_t first_ = 0;
  int device_ = -1;
  Stack inputs_;
  std::vector<Range> ranges_;
  std::vector<std::pair<Tensor, Tensor>> written_; // and as the CPU sees each
  std::vector<std::pair<Tensor, Tensor>> resized_; // on the CPU: what is computed, and where it is kept
};

std::atomic<bool> idle{false};

/// Does nothing, if an operator gives back but what it has written, and returns whether it was so.
bool skip(const c10::OperatorHandle& op, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  for (const c10::Argument& result : schema.returns())
    if (result.alias_info() == nullptr || !result.alias_info()->isWrite()) return false;
  const std::vector<c10::Argument>& arguments = schema.arguments();
  size_t first = stack->size() - arguments.size(), count = schema.returns().size();
  Stack written;
  for (size_t i = 0; i < arguments.size() && written.size() < count; ++i) {
    const c10::AliasInfo* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite()) written.push_back(std::move((*stack)[first + i]));
  }
  stack->resize(first);
  for (IValue& value : written)
    stack->push_back(std::move(value));
  return true;
}

void run_operator(const c10::OperatorHandle& op, Stack* stack) {
  if (idle && skip(op, stack)) return;
  Call(op, stack).run();
}

// --- Memory and views: nothing is launched.

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, c10::GetAllocator(c10::kCUDA), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   at::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(c10::kCUDA),
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA), at::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, source, offset, size, stride);
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return self.set_(source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_empty(Tensor& self) {
  c10::DeviceGuard guard(self.device());
  at::Storage none(c10::Storage::use_byte_size_t(), 0, c10::GetAllocator(c10::kCUDA), true);
  return self.set_(none, 0, {0}, {1});
}

const Tensor& resize(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  c10::DeviceGuard guard(self.device());
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  return self;
}

void record_stream(Tensor& self, at::Stream stream) {
  Memory::get().record_stream(self.storage().mutable_data(), stream.id());
}

// --- Copies, between devices and between a device and the host.

void copy_on_device(const Tensor& to, const Tensor& from) {
  Tensor target = on_cpu(to), source = on_cpu(from);
  target.copy_(source);
  Action again = [target, source] {
    target.copy_(source);
    return true;
  };
  int device = from.device().index();
  if (from.device() == to.device()) {
    record(Kind::kLaunch, device, "aten::copy_", {range_of(from, false), range_of(to, true)}, std::move(again));
    return;
  }
  // On the source's stream, between whatever uses the target before and after.
  Trace& trace = Trace::get();
  if (!trace.is_on()) return;
  int target_device = to.device().index();
  int source_actor = trace.stream_actor(device, current_stream(device));
  int target_actor = trace.stream_actor(target_device, current_stream(target_device));
  Node node{Kind::kCopy,
            source_actor,
            "aten::copy_",
            where(),
            {range_of(from, false), range_of(to, true)},
            {trace.last(target_actor)},
            std::move(again)};
  NodeId id = trace.add(std::move(node), device);
  trace.add({Kind::kWait, target_actor, "wait", where(), {}, {id}, nullptr}, target_device);
}

void copy_to_device(const Tensor& to, const Tensor& from, bool non_blocking) {
  int device = to.device().index();
  bool is_pinned = Memory::get().is_pinned(from.data_ptr());
  Tensor target = on_cpu(to), source = is_pinned ? from : from.clone();
  target.copy_(source);
  std::vector<Range> ranges = {range_of(to, true)};
  if (is_pinned) ranges.push_back(range_of(from, false));
  Action again = [target, source] {
    target.copy_(source);
    return true;
  };
  // What is pageable has been staged when the call returns: it is not read later, and nobody waits for the stream.
  if (!is_pinned || !non_blocking) check_not_capturing(device, "copy of pageable memory");
  record(Kind::kCopy, device, is_pinned ? "copy to the device" : "copy of pageable memory to the device",
         std::move(ranges), std::move(again));
  if (!non_blocking) host_waits_for_stream(device, current_stream(device), "copy to the device");
}

void copy_to_host(const Tensor& to, const Tensor& from, bool non_blocking) {
  int device = from.device().index();
  Tensor source = on_cpu(from);
  if (non_blocking && Memory::get().is_pinned(to.data_ptr())) {
    Tensor target = to.detach();
    Range written = range_of(to, true);
    Action again = [target, source] {
      target.copy_(source);
      return true;
    };
    // What is copied is what is there now; the host sees it when it has waited.
    Tensor now = source.clone();
    NodeId node =
        record(Kind::kCopy, device, "copy to pinned memory", {range_of(from, false), written}, std::move(again));
    Trace::get().run_when_known({node}, [target, now, written] {
      target.copy_(now);
      Memory::get().note_seen(written.begin, written.end);
      return true;
    });
    return;
  }
  check_not_capturing(device, "copy to the host");
  to.copy_(source);
  Tensor seen = source.clone();
  Action again = [source, seen] { return same_bits(source.contiguous(), seen.contiguous()); };
  record(Kind::kCopy, device, "copy to the host", {range_of(from, false)}, std::move(again));
  host_waits_for_stream(device, current_stream(device), "copy to the host");
}

Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.numel() == 0 || self.is_same(source)) return self;
  if (idle && self.is_floating_point()) return self;
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor from = source.sizes() == self.sizes() ? source : source.expand_as(self);
  if (self.is_cuda() && from.is_cuda())
    copy_on_device(self, from);
  else if (self.is_cuda())
    copy_to_device(self, from, non_blocking);
  else
    copy_to_host(self, from, non_blocking);
  return self;
}

} // namespace

void set_idle(bool is_idle) {
  idle = is_idle;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

/// What CUDA does in one launch, though torch has other ways for devices without a kernel.
void take_over_composites(torch::Library& m) {
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    bool is_one_launch =
        name.name.rfind("aten::_foreach_", 0) == 0 || name.name.rfind("aten::native_layer_norm", 0) == 0;
    if (!is_one_launch) continue;
    std::string full = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    m.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_operator>());
  }
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  take_over_composites(m);
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("set_", TORCH_FN(set_empty));
  m.impl("resize_", TORCH_FN(resize));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("copy_", TORCH_FN(copy));
}

} // namespace pretend
