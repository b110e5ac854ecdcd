// zeroopt._C: the kernels, the planner and the board of the shm transport, for Python. Addresses, sizes, dtype codes
// and streams are plain integers (address 0: null); zeroopt/ops checks them. The GIL is released while a kernel
// computes.
#include <limits>
#include <optional>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_config.h"
#include "common/errors.h"
#include "common/wire_code.h"
#include "counting_hook.h"
#include "cpu/isa.h"
#include "cpu/openmp.h"
#include "cpu/shm_board.h"
#include "cpu/shm_mapping.h"
#include "kernels.h"
#include "layouts.h"
#include "ops/by_name.h"
#include "partition.h"

namespace py = pybind11;

namespace zeroopt {
namespace {

using Address = uintptr_t;
using GilReleased = py::call_guard<py::gil_scoped_release>;

template <class T> T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T = void> std::vector<const T*> pointers_to(const std::vector<Address>& addresses) {
  std::vector<const T*> pointers;
  for (Address address : addresses)
    pointers.push_back(pointer<const T>(address));
  return pointers;
}

DType dtype(int code) {
  if (code < 0 || code >= cpu::kNumDTypes)
    throw std::invalid_argument("there is no dtype code " + std::to_string(code));
  return static_cast<DType>(code);
}

ParamFormat param_format(int code) {
  if (code < 0 || code > static_cast<int>(ParamFormat::bfloat16_stochastic))
    throw std::invalid_argument("there is no parameter format " + std::to_string(code));
  return static_cast<ParamFormat>(code);
}

StateFormat state_format(int code) {
  if (code < 0 || code > static_cast<int>(StateFormat::int8))
    throw std::invalid_argument("there is no state format " + std::to_string(code));
  return static_cast<StateFormat>(code);
}

SegmentTable segment_table(Address rows, Address active, Address steps, Address squares, int64_t count) {
  return {pointer<const SegmentRow>(rows), pointer<const uint8_t>(active), pointer<float>(steps),
          pointer<double>(squares), count};
}

/// One step of an optimizer, by the name of the kernel, on the CPU and on CUDA.
void bind_steps(py::module_& m) {
  m.def(
      "step",
      [](const std::string& kernel, Address rows, Address active, Address steps, Address squares, int64_t count,
         int param, int grad, int state, Address groups, Address grad_scale, Address clip_coef, Address found_inf,
         uint64_t seed, int num_threads) {
        cpu::step(
            kernel, segment_table(rows, active, steps, squares, count),
            {param_format(param), dtype(grad), state_format(state)}, pointer<const double>(groups),
            {pointer<const float>(grad_scale), pointer<const float>(clip_coef), pointer<const float>(found_inf), seed},
            num_threads);
      },
      py::arg("kernel"), py::arg("rows"), py::arg("active"), py::arg("steps"), py::arg("squares"), py::arg("count"),
      py::arg("param_format"), py::arg("grad_dtype"), py::arg("state_format"), py::arg("groups"), py::arg("grad_scale"),
      py::arg("clip_coef"), py::arg("found_inf"), py::arg("seed"), py::arg("num_threads"), GilReleased());
  m.def(
      "cuda_step",
      [](const std::string& kernel, Address rows, Address active, Address steps, Address squares, int64_t count,
         int param, int grad, int state, Address groups, Address grad_scale, Address clip_coef, Address found_inf,
         uint64_t seed, int64_t total_numel, Address workspace, Address stream) {
        cuda::step(
            kernel, segment_table(rows, active, steps, squares, count),
            {param_format(param), dtype(grad), state_format(state)}, pointer<const double>(groups),
            {pointer<const float>(grad_scale), pointer<const float>(clip_coef), pointer<const float>(found_inf), seed},
            total_numel, pointer<void>(workspace), pointer<void>(stream));
      },
      py::arg("kernel"), py::arg("rows"), py::arg("active"), py::arg("steps"), py::arg("squares"), py::arg("count"),
      py::arg("param_format"), py::arg("grad_dtype"), py::arg("state_format"), py::arg("groups"), py::arg("grad_scale"),
      py::arg("clip_coef"), py::arg("found_inf"), py::arg("seed"), py::arg("total_numel"), py::arg("workspace"),
      py::arg("stream"), GilReleased());
}

/// What csrc/ops says of an optimizer, under its name; an op that is a further pass of one adds its kernel only.
template <class Op> void add_optimizer(py::dict& optimizers) {
  if (!optimizers.contains(Op::kName)) {
    py::list states, is_signed, flags;
    for (const State& state : Op::kStates) {
      states.append(state.name);
      is_signed.append(state.is_signed);
      flags.append(state.column == kAlways ? py::object(py::none()) : py::int_(state.column));
    }
    py::dict facts;
    facts["kernels"] = py::list();
    facts["columns"] = py::str(Op::kColumns).attr("split")(", ");
    facts["states"] = states;
    facts["signed"] = is_signed;
    facts["flags"] = flags;
    optimizers[Op::kName] = facts;
  }
  optimizers[Op::kName]["kernels"].attr("append")(kernel_name<Op>());
}

template <class... Ops> py::dict optimizers_of(OpList<Ops...>) {
  py::dict optimizers;
  (add_optimizer<Ops>(optimizers), ...);
  return optimizers;
}

void bind_cpu_kernels(py::module_& m) {
  m.def(
      "pack",
      [](Address src, int src_dtype, Address dst, int dst_dtype, int64_t numel, double scale, int num_threads) {
        cpu::pack(pointer<const void>(src), dtype(src_dtype), pointer<void>(dst), dtype(dst_dtype), numel, scale,
                  num_threads);
      },
      py::arg("src"), py::arg("src_dtype"), py::arg("dst"), py::arg("dst_dtype"), py::arg("numel"), py::arg("scale"),
      py::arg("num_threads"), GilReleased());
  m.def(
      "pack_segments",
      [](Address rows, Address active, int64_t count, int src_dtype, int dst_dtype, double scale, int num_threads) {
        cpu::pack_segments(segment_table(rows, active, 0, 0, count), dtype(src_dtype), dtype(dst_dtype), scale,
                           num_threads);
      },
      py::arg("rows"), py::arg("active"), py::arg("count"), py::arg("src_dtype"), py::arg("dst_dtype"),
      py::arg("scale"), py::arg("num_threads"), GilReleased());
  m.def(
      "reduce",
      [](const std::vector<Address>& slices, int slice_dtype, Address base, Address out, int out_dtype, int64_t numel,
         int num_threads) {
        const std::vector<const void*> pointers = pointers_to(slices);
        cpu::reduce(pointers.data(), static_cast<int64_t>(pointers.size()), dtype(slice_dtype),
                    pointer<const void>(base), pointer<void>(out), dtype(out_dtype), numel, num_threads);
      },
      py::arg("slices"), py::arg("slice_dtype"), py::arg("base"), py::arg("out"), py::arg("out_dtype"),
      py::arg("numel"), py::arg("num_threads"), GilReleased());
  m.def(
      "copy",
      [](Address src, Address dst, int64_t bytes, int num_threads) {
        cpu::copy(pointer<const void>(src), pointer<void>(dst), bytes, num_threads);
      },
      py::arg("src"), py::arg("dst"), py::arg("bytes"), py::arg("num_threads"), GilReleased());
  m.def(
      "quantize",
      [](Address values, Address codes, Address scales, int64_t numel, bool is_signed, int num_threads) {
        cpu::quantize(pointer<const float>(values), pointer<uint8_t>(codes), pointer<float>(scales), numel, is_signed,
                      num_threads);
      },
      py::arg("values"), py::arg("codes"), py::arg("scales"), py::arg("numel"), py::arg("is_signed"),
      py::arg("num_threads"), GilReleased());
  m.def(
      "dequantize",
      [](Address codes, Address scales, Address values, int64_t numel, bool is_signed, int num_threads) {
        cpu::dequantize(pointer<const uint8_t>(codes), pointer<const float>(scales), pointer<float>(values), numel,
                        is_signed, num_threads);
      },
      py::arg("codes"), py::arg("scales"), py::arg("values"), py::arg("numel"), py::arg("is_signed"),
      py::arg("num_threads"), GilReleased());
  m.def(
      "encode_slices",
      [](Address values, int dtype_code, Address residual, Address encoded, int64_t slice_numel, int64_t num_slices,
         int bits, uint64_t seed, uint32_t step, uint32_t key, int num_threads) {
        cpu::encode_slices(pointer<const void>(values), dtype(dtype_code), pointer<uint16_t>(residual),
                           pointer<uint8_t>(encoded), slice_numel, num_slices, bits, seed, step, key, num_threads);
      },
      py::arg("values"), py::arg("dtype"), py::arg("residual"), py::arg("encoded"), py::arg("slice_numel"),
      py::arg("num_slices"), py::arg("bits"), py::arg("seed"), py::arg("step"), py::arg("key"), py::arg("num_threads"),
      GilReleased());
  m.def(
      "sum_encoded",
      [](const std::vector<Address>& slices, int bits, Address base, Address out, int out_dtype, int64_t numel,
         int num_threads) {
        const std::vector<const uint8_t*> pointers = pointers_to<uint8_t>(slices);
        cpu::sum_encoded(pointers.data(), static_cast<int64_t>(pointers.size()), bits, pointer<const void>(base),
                         pointer<void>(out), dtype(out_dtype), numel, num_threads);
      },
      py::arg("slices"), py::arg("bits"), py::arg("base"), py::arg("out"), py::arg("out_dtype"), py::arg("numel"),
      py::arg("num_threads"), GilReleased());
  m.def(
      "squared_norms",
      [](Address rows, Address active, Address squares, int64_t count, int grad, Address found_inf, int num_threads) {
        cpu::squared_norms(segment_table(rows, active, 0, squares, count), dtype(grad), pointer<float>(found_inf),
                           num_threads);
      },
      py::arg("rows"), py::arg("active"), py::arg("squares"), py::arg("count"), py::arg("grad_dtype"),
      py::arg("found_inf"), py::arg("num_threads"), GilReleased());
  m.def(
      "sum_in_parts",
      [](Address values, int64_t numel, double scale, bool squared, const std::vector<double>& rounders, Address sums,
         int num_threads) {
        if (rounders.size() != kSumParts) throw std::invalid_argument("sum_in_parts: expected a rounder for each part");
        cpu::sum_in_parts(pointer<const float>(values), numel, scale, squared, rounders.data(), pointer<double>(sums),
                          num_threads);
      },
      py::arg("values"), py::arg("numel"), py::arg("scale"), py::arg("squared"), py::arg("rounders"), py::arg("sums"),
      py::arg("num_threads"), GilReleased());
}

void bind_cuda_kernels(py::module_& m) {
  m.def(
      "cuda_try_launch", [](Address stream) { cuda::try_launch(pointer<void>(stream)); }, py::arg("stream"),
      GilReleased());
  m.def("cuda_driver_version", &cuda::driver_version);
  m.def(
      "cuda_pack",
      [](Address src, int src_dtype, Address dst, int dst_dtype, int64_t numel, double scale, Address stream) {
        cuda::pack(pointer<const void>(src), dtype(src_dtype), pointer<void>(dst), dtype(dst_dtype), numel, scale,
                   pointer<void>(stream));
      },
      py::arg("src"), py::arg("src_dtype"), py::arg("dst"), py::arg("dst_dtype"), py::arg("numel"), py::arg("scale"),
      py::arg("stream"), GilReleased());
  m.def(
      "cuda_pack_segments",
      [](Address rows, Address active, int64_t count, int src_dtype, int dst_dtype, double scale, Address stream) {
        cuda::pack_segments(segment_table(rows, active, 0, 0, count), dtype(src_dtype), dtype(dst_dtype), scale,
                            pointer<void>(stream));
      },
      py::arg("rows"), py::arg("active"), py::arg("count"), py::arg("src_dtype"), py::arg("dst_dtype"),
      py::arg("scale"), py::arg("stream"), GilReleased());
  m.def(
      "cuda_reduce",
      [](const std::vector<Address>& slices, int slice_dtype, Address base, Address out, int out_dtype, int64_t numel,
         Address stream) {
        const std::vector<const void*> pointers = pointers_to(slices);
        cuda::reduce(pointers.data(), static_cast<int64_t>(pointers.size()), dtype(slice_dtype),
                     pointer<const void>(base), pointer<void>(out), dtype(out_dtype), numel, pointer<void>(stream));
      },
      py::arg("slices"), py::arg("slice_dtype"), py::arg("base"), py::arg("out"), py::arg("out_dtype"),
      py::arg("numel"), py::arg("stream"), GilReleased());
  m.def(
      "cuda_quantize",
      [](Address values, Address codes, Address scales, int64_t numel, bool is_signed, Address stream) {
        cuda::quantize(pointer<const float>(values), pointer<uint8_t>(codes), pointer<float>(scales), numel, is_signed,
                       pointer<void>(stream));
      },
      py::arg("values"), py::arg("codes"), py::arg("scales"), py::arg("numel"), py::arg("is_signed"), py::arg("stream"),
      GilReleased());
  m.def(
      "cuda_dequantize",
      [](Address codes, Address scales, Address values, int64_t numel, bool is_signed, Address stream) {
        cuda::dequantize(pointer<const uint8_t>(codes), pointer<const float>(scales), pointer<float>(values), numel,
                         is_signed, pointer<void>(stream));
      },
      py::arg("codes"), py::arg("scales"), py::arg("values"), py::arg("numel"), py::arg("is_signed"), py::arg("stream"),
      GilReleased());
  m.def(
      "cuda_encode_slices",
      [](Address values, int dtype_code, Address residual, Address encoded, int64_t slice_numel, int64_t num_slices,
         int bits, uint64_t seed, uint32_t step, uint32_t key, Address stream) {
        cuda::encode_slices(pointer<const void>(values), dtype(dtype_code), pointer<uint16_t>(residual),
                            pointer<uint8_t>(encoded), slice_numel, num_slices, bits, seed, step, key,
                            pointer<void>(stream));
      },
      py::arg("values"), py::arg("dtype"), py::arg("residual"), py::arg("encoded"), py::arg("slice_numel"),
      py::arg("num_slices"), py::arg("bits"), py::arg("seed"), py::arg("step"), py::arg("key"), py::arg("stream"),
      GilReleased());
  m.def(
      "cuda_sum_encoded",
      [](const std::vector<Address>& slices, int bits, Address base, Address out, int out_dtype, int64_t numel,
         Address stream) {
        const std::vector<const uint8_t*> pointers = pointers_to<uint8_t>(slices);
        cuda::sum_encoded(pointers.data(), static_cast<int64_t>(pointers.size()), bits, pointer<const void>(base),
                          pointer<void>(out), dtype(out_dtype), numel, pointer<void>(stream));
      },
      py::arg("slices"), py::arg("bits"), py::arg("base"), py::arg("out"), py::arg("out_dtype"), py::arg("numel"),
      py::arg("stream"), GilReleased());
  m.def("cuda_norm_workspace_bytes", &cuda::norm_workspace_bytes, py::arg("num_segments"), py::arg("total_numel"));
  m.def("cuda_step_workspace_bytes", &cuda::step_workspace_bytes, py::arg("kernel"), py::arg("num_segments"),
        py::arg("total_numel"));
  m.def(
      "cuda_squared_norms",
      [](Address rows, Address active, Address squares, int64_t count, int grad, Address found_inf, int64_t total_numel,
         Address workspace, Address stream) {
        cuda::squared_norms(segment_table(rows, active, 0, squares, count), dtype(grad), pointer<float>(found_inf),
                            total_numel, pointer<void>(workspace), pointer<void>(stream));
      },
      py::arg("rows"), py::arg("active"), py::arg("squares"), py::arg("count"), py::arg("grad_dtype"),
      py::arg("found_inf"), py::arg("total_numel"), py::arg("workspace"), py::arg("stream"), GilReleased());
}

using WholeCosts = std::vector<std::optional<int64_t>>; // none at all: no parameter has to stay whole

std::vector<ParamSpec> param_specs(const std::vector<int64_t>& numels, const std::vector<int64_t>& kinds,
                                   const std::vector<int64_t>& item_bytes, const WholeCosts& whole_costs) {
  if (kinds.size() != numels.size() || item_bytes.size() != numels.size()) {
    throw std::invalid_argument("expected numels, kinds and item_bytes of one length, got " +
                                std::to_string(numels.size()) + ", " + std::to_string(kinds.size()) + " and " +
                                std::to_string(item_bytes.size()));
  }
  if (!whole_costs.empty() && whole_costs.size() != numels.size()) {
    throw std::invalid_argument("expected no whole_costs or one for each parameter, got " +
                                std::to_string(whole_costs.size()) + " for " + std::to_string(numels.size()));
  }
  std::vector<ParamSpec> params;
  for (size_t i = 0; i < numels.size(); ++i)
    params.push_back({numels[i], kinds[i], item_bytes[i], whole_costs.empty() ? std::nullopt : whole_costs[i]});
  return params;
}

void bind_planner(py::module_& m) {
  py::class_<BucketPlan>(m, "BucketPlan")
      .def_readonly("kind", &BucketPlan::kind)
      .def_readonly("whole", &BucketPlan::whole)
      .def_readonly("padded_numel", &BucketPlan::padded_numel)
      .def_readonly("params", &BucketPlan::params)
      .def_readonly("offsets", &BucketPlan::offsets)
      .def_readonly("numels", &BucketPlan::numels)
      .def_readonly("owners", &BucketPlan::owners);
  py::class_<Segment>(m, "Segment")
      .def_readonly("param", &Segment::param)
      .def_readonly("start", &Segment::start)
      .def_readonly("offset", &Segment::offset)
      .def_readonly("numel", &Segment::numel);
  py::class_<Plan>(m, "Plan")
      .def(py::init([](const std::vector<int64_t>& numels, const std::vector<int64_t>& kinds,
                       const std::vector<int64_t>& item_bytes, int64_t world_size, int64_t alignment,
                       int64_t bucket_bytes, const WholeCosts& whole_costs, std::optional<int64_t> slice_alignment,
                       double padding_share, int64_t padding_bytes) {
             return Plan(param_specs(numels, kinds, item_bytes, whole_costs), world_size,
                         Alignment{alignment, slice_alignment.value_or(alignment)}, bucket_bytes,
                         PaddingLimit{padding_share, padding_bytes});
           }),
           py::arg("numels"), py::arg("kinds"), py::arg("item_bytes"), py::arg("world_size"), py::arg("alignment"),
           py::arg("bucket_bytes"), py::arg("whole_costs") = WholeCosts{}, py::arg("slice_alignment") = py::none(),
           py::arg("padding_share") = std::numeric_limits<double>::infinity(), py::arg("padding_bytes") = 0)
      .def_property_readonly("buckets", &Plan::buckets)
      .def_property_readonly("world_size", &Plan::world_size)
      .def_property_readonly("alignment", &Plan::alignment)
      .def("shard_numel", &Plan::shard_numel, py::arg("bucket"))
      .def("own_range", &Plan::own_range, py::arg("bucket"), py::arg("rank"))
      .def("segments", &Plan::segments, py::arg("bucket"), py::arg("begin"), py::arg("end"));
}

void bind_shared_memory(py::module_& m) {
  py::class_<Ticket>(m, "Ticket")
      .def(py::init([](int64_t kind, int64_t bytes, int64_t buffer) { return Ticket{kind, bytes, buffer}; }),
           py::arg("kind"), py::arg("bytes"), py::arg("buffer"))
      .def_readonly("kind", &Ticket::kind)
      .def_readonly("bytes", &Ticket::bytes)
      .def_readonly("buffer", &Ticket::buffer);
  py::class_<ShmBoard> board(m, "ShmBoard");
  board
      .def(py::init([](Address memory, int64_t rank, int64_t world_size) {
             return ShmBoard(pointer<void>(memory), rank, world_size);
           }),
           py::arg("memory"), py::arg("rank"), py::arg("world_size"))
      .def_static("bytes", &ShmBoard::bytes, py::arg("world_size"))
      .def("post", &ShmBoard::post, py::arg("ticket"))
      .def("mark_read", &ShmBoard::mark_read, py::arg("count"))
      .def("leave", &ShmBoard::leave)
      .def("wait", &ShmBoard::wait, py::arg("posted_count"), py::arg("read_count"), py::arg("seconds"), GilReleased())
      .def("posted", &ShmBoard::posted)
      .def("read", &ShmBoard::read)
      .def("left", &ShmBoard::left)
      .def("ticket", &ShmBoard::ticket, py::arg("rank"), py::arg("number"));
  board.attr("CAPACITY") = ShmBoard::kCapacity;
  board.attr("NEVER") = ShmBoard::kNever;
  py::class_<SharedMapping>(m, "SharedMapping", py::buffer_protocol())
      .def(py::init<int, int64_t>(), py::arg("fd"), py::arg("num_bytes"))
      .def_buffer([](SharedMapping& mapping) {
        return py::buffer_info(static_cast<uint8_t*>(mapping.address()), static_cast<py::ssize_t>(mapping.bytes()));
      });
  m.def("hold_rank_lock", &hold_rank_lock, py::arg("fd"), py::arg("rank"));
  m.def("rank_lock_is_held", &rank_lock_is_held, py::arg("fd"), py::arg("rank"));
}

/// Layouts, and what tells of tensors.
struct LookedAt {
  dlpack::Exchange* exchange;
  Layouts layouts;

  /// Writes the tensors' addresses. Nothing where one is laid out otherwise, or not all are of one dtype and on one
  /// device.
  std::optional<std::tuple<int, int, int, int>> look(const py::list& tensors, Address addresses) const {
    int64_t* out = pointer<int64_t>(addresses);
    dlpack::Tensor first{}, tensor{};
    if (static_cast<int64_t>(tensors.size()) != layouts.count()) return std::nullopt;
    for (int64_t i = 0; i < layouts.count(); ++i) {
      if (exchange->look(PyList_GET_ITEM(tensors.ptr(), i), &tensor) != 0) {
        PyErr_Clear(); // one that DLPack cannot describe, a sparse one, say
        return std::nullopt;
      }
      if (i == 0) first = tensor;
      if (!layouts.has(i, tensor) || !is_alike(first, tensor)) return std::nullopt;
      out[i] = static_cast<int64_t>(reinterpret_cast<Address>(tensor.data) + tensor.byte_offset);
    }
    if (layouts.count() == 0 || first.dtype.lanes != 1) return std::nullopt;
    return std::make_tuple(first.dtype.code, first.dtype.bits, first.device.type, first.device.number);
  }
};

dlpack::Exchange* exchange_of(const py::capsule& capsule) {
  auto* exchange = static_cast<dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->major_version != dlpack::kMajorVersion || exchange->look == nullptr)
    throw std::invalid_argument("expected DLPack's exchange API of version 1, with what tells of tensors");
  return exchange;
}

void bind_layouts(py::module_& m) {
  py::class_<LookedAt>(m, "Layouts")
      .def(py::init([](const py::capsule& exchange, const std::vector<std::vector<int64_t>>& shapes,
                       const std::vector<std::vector<int64_t>>& strides) {
             return LookedAt{exchange_of(exchange), Layouts(shapes, strides)};
           }),
           py::arg("exchange"), py::arg("shapes"), py::arg("strides"))
      .def("look", &LookedAt::look, py::arg("tensors"), py::arg("addresses"));
}

py::dict build_info() {
  py::list isas;
  for (const cpu::Isa& isa : cpu::compiled_isas())
    isas.append(isa.name);
  py::dict facts;
  facts["version"] = ZEROOPT_VERSION;
  facts["compiler"] = ZEROOPT_COMPILER;
  facts["flags"] = ZEROOPT_FLAGS;
  facts["cuda"] = ZEROOPT_WITH_CUDA != 0;
  facts["cuda_version"] = ZEROOPT_CUDA_VERSION;
  facts["cuda_problem"] = ZEROOPT_CUDA_PROBLEM;
  facts["cuda_archs"] = py::str(ZEROOPT_CUDA_ARCHS).attr("split")();
  facts["openmp"] = cpu::openmp_library();
  facts["isas"] = isas;
  facts["isa"] = cpu::isa().name;
  return facts;
}

// Looked up when it is needed: the module itself can be imported without the package and without torch.
void translate_errors(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const KernelUnavailable& unavailable) {
    py::set_error(py::module_::import("zeroopt.errors").attr("KernelUnavailableError"), unavailable.what());
  }
}

} // namespace
} // namespace zeroopt

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels and planner of zeroopt. Call them through zeroopt.ops, which checks its arguments.";
  zeroopt::cpu::isa(); // a bad ZEROOPT_CPU_ISA fails the import rather than the first step
  py::register_local_exception_translator(&zeroopt::translate_errors);
  zeroopt::bind_cpu_kernels(m);
  zeroopt::bind_cuda_kernels(m);
  zeroopt::bind_steps(m);
  zeroopt::bind_planner(m);
  zeroopt::bind_shared_memory(m);
  zeroopt::bind_layouts(m);
  if (zeroopt::add_counting_hook(m.ptr()) != 0) throw py::error_already_set();
  m.def("encoded_bytes", &zeroopt::wire_bytes, py::arg("numel"), py::arg("bits"));
  m.def("optimizers", [] { return zeroopt::optimizers_of(zeroopt::AllOps{}); });
  m.def("build_info", &zeroopt::build_info);
  m.def("cpu_isa", [] { return zeroopt::cpu::isa().name; });
}
