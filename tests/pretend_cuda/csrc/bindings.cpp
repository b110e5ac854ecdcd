// What Python sees of the pretend device: tests/pretend_cuda/_device.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"
#include "memory.h"
#include "replay.h"
#include "trace.h"

namespace py = pybind11;

namespace pretend {

namespace {

std::string line_of(PyFrameObject* frame) {
  PyCodeObject* code = PyFrame_GetCode(frame);
  std::string path = PyUnicode_AsUTF8(code->co_filename);
  std::string line = std::to_string(PyFrame_GetLineNumber(frame));
  std::string function = PyUnicode_AsUTF8(code->co_name);
  Py_DECREF(code);
  return path + ":" + line + " " + function;
}

std::string package_folder = "/nowhere/"; // with a slash at its end
int shown_lines = 3;

bool is_of_package(const std::string& line) {
  return line.rfind(package_folder, 0) == 0;
}

std::string in_short(const std::string& line) {
  if (!is_of_package(line)) return line.substr(line.rfind('/') + 1);
  return "zeroopt/" + line.substr(package_folder.size());
}

/// The innermost lines of the package, or the innermost line of whoever it is.
std::string where_now() {
  std::string innermost, chain;
  int count = 0;
  PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
  while (frame != nullptr && count < shown_lines) {
    std::string line = line_of(frame);
    if (innermost.empty() && line.find("/torch/") == std::string::npos &&
        line.find("/pretend_cuda/") == std::string::npos)
      innermost = in_short(line);
    if (is_of_package(line)) {
      chain += (count++ == 0 ? "" : " < ") + in_short(line);
    }
    PyFrameObject* outer = PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = outer;
  }
  Py_XDECREF(frame);
  if (!chain.empty()) return chain;
  return innermost.empty() ? "autograd" : innermost;
}

} // namespace

std::string where() {
  if (!Py_IsInitialized()) return "";
  py::gil_scoped_acquire lock;
  return where_now();
}

namespace {

using Ranges = std::vector<std::tuple<uintptr_t, uintptr_t, bool>>;

std::vector<Range> ranges_of(const Ranges& ranges) {
  std::vector<Range> result;
  for (auto [begin, end, is_write] : ranges)
    if (end > begin) result.push_back({begin, end, is_write});
  return result;
}

/// A Python function that may be dropped, and called, by a thread without Python's lock.
Action action_of(py::object function) {
  if (function.is_none()) return nullptr;
  std::shared_ptr<PyObject> kept(function.release().ptr(), [](PyObject* object) {
    py::gil_scoped_acquire lock;
    Py_DECREF(object);
  });
  return [kept] {
    py::gil_scoped_acquire lock;
    return py::reinterpret_borrow<py::object>(kept.get())().cast<bool>();
  };
}

NodeId add(Kind kind, int actor, int host_device, const std::string& name, const Ranges& ranges,
           const std::vector<NodeId>& after, py::object action) {
  if (!Trace::get().is_on()) return kNone;
  Node node{kind, actor, name, where(), ranges_of(ranges), after, action_of(std::move(action))};
  py::gil_scoped_release release;
  return Trace::get().add(std::move(node), host_device);
}

void bind_trace(py::module_& m) {
  py::enum_<Kind>(m, "Kind")
      .value("LAUNCH", Kind::kLaunch)
      .value("COPY", Kind::kCopy)
      .value("COLLECTIVE", Kind::kCollective)
      .value("MARK", Kind::kMark)
      .value("WAIT", Kind::kWait)
      .value("HOST_WAIT", Kind::kHostWait)
      .value("HOST_QUERY", Kind::kHostQuery)
      .value("HOST_WRITE", Kind::kHostWrite)
      .value("FREE", Kind::kFree);
  py::class_<Range>(m, "Range")
      .def_readonly("begin", &Range::begin)
      .def_readonly("end", &Range::end)
      .def_readonly("is_write", &Range::is_write);
  py::class_<Node>(m, "Node")
      .def_readonly("kind", &Node::kind)
      .def_readonly("actor", &Node::actor)
      .def_readonly("name", &Node::name)
      .def_readonly("where", &Node::where)
      .def_readonly("ranges", &Node::ranges)
      .def_readonly("after", &Node::after)
      .def_readonly("launched_after", &Node::launched_after)
      .def_readonly("clock", &Node::clock);
  m.def("begin", [] { Trace::get().begin(); }, py::call_guard<py::gil_scoped_release>());
  m.def("end", [] { Trace::get().end(); }, py::call_guard<py::gil_scoped_release>());
  m.def("is_on", [] { return Trace::get().is_on(); });
  m.def("nodes", [] { return std::vector<Node>(Trace::get().nodes().begin(), Trace::get().nodes().end()); });
  m.def(
      "run_node", [](NodeId id) { return !Trace::get().nodes()[id].action || Trace::get().nodes()[id].action(); },
      py::call_guard<py::gil_scoped_release>());
  m.def("num_nodes", [] { return Trace::get().nodes().size(); });
  m.def("actors", [] { return Trace::get().actors(); });
  m.def("add", &add, py::arg("kind"), py::arg("actor"), py::arg("host_device"), py::arg("name"), py::arg("ranges"),
        py::arg("after"), py::arg("action"));
  m.def("stream_actor", [](int device, int64_t stream) { return Trace::get().stream_actor(device, stream); });
  m.def("set_package_folder", [](const std::string& folder) { package_folder = folder + "/"; });
  m.def("set_shown_lines", [](int count) { shown_lines = count; });
  m.def("host_actor", [](int device) { return Trace::get().host_actor(device); });
  m.def("share_host", [](int device, int with_device) { Trace::get().share_host(device, with_device); });
  m.def("host_of", [](int device) { return Trace::get().host_of(device); });
  m.def("last", [](int actor) { return Trace::get().last(actor); });
  m.def("host_waits", &host_waits_for_stream, py::arg("device"), py::arg("stream"), py::arg("why"));
  py::class_<Replay>(m, "Replay")
      .def(py::init<const std::set<NodeId>&>(), py::arg("left_out"))
      .def("run", &Replay::run, py::arg("seed"), py::call_guard<py::gil_scoped_release>());
}

void bind_device(py::module_& m) {
  m.attr("NUM_DEVICES") = kDevices;
  m.def("current_device", &current_device);
  m.def("current_stream", &current_stream);
  m.def("set_device", &set_device);
  m.def("set_stream", &set_stream);
  m.def("new_stream", &new_stream);
  m.def("set_host_ahead", &set_host_ahead);
  m.def("begin_capture", &begin_capture);
  m.def("end_capture", &end_capture);
  m.def("capture_of", &capture_of);
  m.def("streams_in", &streams_in);
  m.def("come_behind", &come_behind);
  m.def("set_idle", &set_idle);
  m.def("keep_idle", [] { Memory::get().keep_idle(); });
  m.def("reset_peak", [](int device) { Memory::get().reset_peak(device); });
  m.def("peak_bytes", [](int device) { return Memory::get().peak_bytes(device); });
  m.def("live_bytes", [](int device) { return Memory::get().live_bytes(device); });
  m.def("device_of", [](uintptr_t address) { return Memory::get().device_of(reinterpret_cast<void*>(address)); });
}

} // namespace
} // namespace pretend

PYBIND11_MODULE(_device, m) {
  pretend::bind_trace(m);
  pretend::bind_device(m);
}
