// The hook by which autograd tells that a gradient is there, for those gradients of which nothing but their coming has
// to be noted: `zeroopt/gradients/counting.py` in the C API of Python, for it runs once a parameter between two of
// autograd's own kernels. What it counts in are the lists of the Python code.
#pragma once

#include <Python.h>

namespace zeroopt {

/// Adds the types `Arrivals` and `CountingHook` to a module. Returns 0, or -1 with an exception set.
int add_counting_hook(PyObject* module);

} // namespace zeroopt
