#include "counting_hook.h"

#include <structmember.h>

#include <cstddef>
#include <initializer_list>

namespace zeroopt {
namespace {

/// Attributes as zeroopt/gradients/counting.py says. All are null until they are set.
struct Arrivals {
  PyObject_HEAD PyObject* arrived;
  PyObject* order;
  PyObject* missing;
  PyObject* bucket_of;
  PyObject* last;
  PyObject* tell;
  char is_on;
};

struct Hook {
  PyObject_HEAD PyObject* arrivals;
  Py_ssize_t index;
};

PyTypeObject* arrivals_type = nullptr;
PyObject *hooks_name = nullptr, *complete_name = nullptr, *look_name = nullptr;

/// Instead of how many gradients of a bucket are missing.
constexpr Py_ssize_t kFailed = -2, kUncounted = -1;

bool has(PyObject* list, Py_ssize_t place) {
  return list != nullptr && PyList_CheckExact(list) && place >= 0 && place < PyList_GET_SIZE(list);
}

bool has_arrived(PyObject* arrived, Py_ssize_t index) {
  return PyByteArray_AS_STRING(arrived)[index] != 0;
}

/// Of a parameter; -1 with an exception where the lists have no such parameter.
Py_ssize_t bucket_of(const Arrivals& self, Py_ssize_t index) {
  if (!has(self.bucket_of, index) || self.arrived == nullptr || !PyByteArray_CheckExact(self.arrived) ||
      index >= PyByteArray_GET_SIZE(self.arrived)) {
    PyErr_Format(PyExc_IndexError, "there is no parameter %zd", index);
    return -1;
  }
  const Py_ssize_t bucket = PyLong_AsSsize_t(PyList_GET_ITEM(self.bucket_of, index));
  if (bucket == -1 && PyErr_Occurred() != nullptr) return -1;
  if (!has(self.missing, bucket) || !has(self.last, bucket)) {
    PyErr_Format(PyExc_IndexError, "there is no bucket %zd", bucket);
    return -1;
  }
  return bucket;
}

/// Whether the gradient of a bucket that came last waits, on the very stream that is current now; -1: with an
/// exception.
int waits_here(const Arrivals& self, Py_ssize_t bucket) {
  PyObject* last = PyList_GET_ITEM(self.last, bucket);
  if (last == Py_None || self.tell == nullptr) return 0;
  Py_INCREF(last);
  PyObject* here = PyObject_CallNoArgs(self.tell);
  const int is_same = here == nullptr ? -1 : PyObject_RichCompareBool(here, last, Py_EQ);
  Py_XDECREF(here);
  Py_DECREF(last);
  return is_same;
}

Py_ssize_t note(Arrivals& self, Py_ssize_t index) {
  const Py_ssize_t bucket = bucket_of(self, index);
  if (bucket < 0) return kFailed;
  const Py_ssize_t missing = PyLong_AsSsize_t(PyList_GET_ITEM(self.missing, bucket)) - 1;
  PyObject *place = PyLong_FromSsize_t(index), *left = PyLong_FromSsize_t(missing);
  const bool is_noted =
      place != nullptr && left != nullptr && self.order != nullptr && PyList_Append(self.order, place) == 0;
  Py_XDECREF(place);
  if (!is_noted) {
    Py_XDECREF(left);
    return kFailed;
  }
  PyByteArray_AS_STRING(self.arrived)[index] = 1;
  return PyList_SetItem(self.missing, bucket, left) == 0 ? missing : kFailed;
}

Py_ssize_t count(Arrivals& self, Py_ssize_t index) {
  if (self.is_on == 0) return kUncounted;
  const Py_ssize_t bucket = bucket_of(self, index);
  if (bucket < 0) return kFailed;
  if (has_arrived(self.arrived, index)) return kUncounted;
  const int is_here = waits_here(self, bucket);
  return is_here < 0 ? kFailed : is_here == 0 ? kUncounted : note(self, index);
}

template <Py_ssize_t (*function)(Arrivals&, Py_ssize_t)> PyObject* call_with_index(PyObject* self, PyObject* argument) {
  const Py_ssize_t index = PyLong_AsSsize_t(argument);
  if (index == -1 && PyErr_Occurred() != nullptr) return nullptr;
  const Py_ssize_t missing = function(*reinterpret_cast<Arrivals*>(self), index);
  if (missing == kFailed) return nullptr;
  if (missing == kUncounted) Py_RETURN_NONE;
  return PyLong_FromSsize_t(missing);
}

/// Whether ours is the only hook of a parameter; -1: with an exception.
int is_alone(PyObject* param) {
  PyObject* hooks = PyObject_GetAttr(param, hooks_name);
  if (hooks == nullptr) return -1;
  const Py_ssize_t number = PyObject_Size(hooks);
  Py_DECREF(hooks);
  return number < 0 ? -1 : number == 1;
}

PyObject* take(PyObject* self, Arrivals& arrivals, Py_ssize_t index, PyObject* param) {
  const Py_ssize_t missing = count(arrivals, index);
  if (missing > 0) Py_RETURN_NONE;
  if (missing == kFailed) return nullptr;
  if (missing == kUncounted) return PyObject_CallMethodOneArg(self, look_name, param);
  PyObject* bucket = PyLong_FromSsize_t(bucket_of(arrivals, index));
  PyObject* result = bucket == nullptr ? nullptr : PyObject_CallMethodOneArg(self, complete_name, bucket);
  Py_XDECREF(bucket);
  return result;
}

PyObject* call_hook(PyObject* self, PyObject* args, PyObject*) {
  if (PyTuple_GET_SIZE(args) != 1) {
    PyErr_SetString(PyExc_TypeError, "expected a parameter");
    return nullptr;
  }
  PyObject* param = PyTuple_GET_ITEM(args, 0);
  Hook* hook = reinterpret_cast<Hook*>(self);
  const int alone = is_alone(param);
  if (alone < 0) return nullptr;
  const bool may_count = alone == 1 && hook->arrivals != nullptr && Py_TYPE(hook->arrivals) == arrivals_type;
  if (!may_count) return PyObject_CallMethodOneArg(self, look_name, param);
  PyObject* kept = hook->arrivals;
  Py_INCREF(kept);
  PyObject* result = take(self, *reinterpret_cast<Arrivals*>(kept), hook->index, param);
  Py_DECREF(kept);
  return result;
}

void free_object(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

void free_arrivals(PyObject* self) {
  Arrivals& arrivals = *reinterpret_cast<Arrivals*>(self);
  for (PyObject** attribute :
       {&arrivals.arrived, &arrivals.order, &arrivals.missing, &arrivals.bucket_of, &arrivals.last, &arrivals.tell})
    Py_CLEAR(*attribute);
  free_object(self);
}

void free_hook(PyObject* self) {
  Py_CLEAR(reinterpret_cast<Hook*>(self)->arrivals);
  free_object(self);
}

PyMemberDef arrivals_members[] = {{"arrived", T_OBJECT_EX, offsetof(Arrivals, arrived), 0, nullptr},
                                  {"order", T_OBJECT_EX, offsetof(Arrivals, order), 0, nullptr},
                                  {"missing", T_OBJECT_EX, offsetof(Arrivals, missing), 0, nullptr},
                                  {"bucket_of", T_OBJECT_EX, offsetof(Arrivals, bucket_of), 0, nullptr},
                                  {"last", T_OBJECT_EX, offsetof(Arrivals, last), 0, nullptr},
                                  {"tell", T_OBJECT_EX, offsetof(Arrivals, tell), 0, nullptr},
                                  {"is_on", T_BOOL, offsetof(Arrivals, is_on), 0, nullptr},
                                  {nullptr, 0, 0, 0, nullptr}};

PyMemberDef hook_members[] = {{"arrivals", T_OBJECT_EX, offsetof(Hook, arrivals), 0, nullptr},
                              {"index", T_PYSSIZET, offsetof(Hook, index), 0, nullptr},
                              {nullptr, 0, 0, 0, nullptr}};

PyMethodDef arrivals_methods[] = {{"count", &call_with_index<count>, METH_O, nullptr},
                                  {"note", &call_with_index<note>, METH_O, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};

template <class Function> void* as_slot(Function* function) {
  return reinterpret_cast<void*>(function);
}

PyType_Slot arrivals_slots[] = {{Py_tp_new, as_slot(&PyType_GenericNew)},
                                {Py_tp_dealloc, as_slot(&free_arrivals)},
                                {Py_tp_members, arrivals_members},
                                {Py_tp_methods, arrivals_methods},
                                {0, nullptr}};

PyType_Slot hook_slots[] = {{Py_tp_new, as_slot(&PyType_GenericNew)},
                            {Py_tp_dealloc, as_slot(&free_hook)},
                            {Py_tp_call, as_slot(&call_hook)},
                            {Py_tp_members, hook_members},
                            {0, nullptr}};

// No collector of garbage: what hooks keep leads back to no hook and to no parameter.
PyType_Spec arrivals_spec{"zeroopt._C.Arrivals", sizeof(Arrivals), 0, Py_TPFLAGS_DEFAULT, arrivals_slots};
PyType_Spec hook_spec{"zeroopt._C.CountingHook", sizeof(Hook), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, hook_slots};

PyObject* add_type(PyObject* module, const char* name, PyType_Spec& spec) {
  PyObject* type = PyType_FromSpec(&spec);
  return type != nullptr && PyModule_AddObjectRef(module, name, type) == 0 ? type : nullptr;
}

} // namespace

int add_counting_hook(PyObject* module) {
  hooks_name = PyUnicode_InternFromString("_post_accumulate_grad_hooks");
  complete_name = PyUnicode_InternFromString("complete");
  look_name = PyUnicode_InternFromString("look");
  arrivals_type = reinterpret_cast<PyTypeObject*>(add_type(module, "Arrivals", arrivals_spec));
  const bool is_whole = arrivals_type != nullptr && add_type(module, "CountingHook", hook_spec) != nullptr &&
                        hooks_name != nullptr && complete_name != nullptr && look_name != nullptr;
  return is_whole ? 0 : -1;
}

} // namespace zeroopt
