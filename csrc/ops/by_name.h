// The op that a kernel's name stands for.
#pragma once

#include <stdexcept>
#include <string>

#include "ops/all.h"

namespace zeroopt {

/// "adamw"; of an optimizer of several passes, "lamb_moments".
template <class Op> std::string kernel_name() {
  return Op::kPass == nullptr ? Op::kName : std::string(Op::kName) + "_" + Op::kPass;
}

template <class Body, class... Ops> bool call_with_op(const std::string& name, const Body& body, OpList<Ops...>) {
  return ((name == kernel_name<Ops>() && (body(Ops{}), true)) || ...);
}

/// Calls body(op) with an object of the op of this name.
/// @throws std::invalid_argument when there is none.
template <class Body> void with_op(const std::string& name, const Body& body) {
  if (!call_with_op(name, body, AllOps{})) throw std::invalid_argument("there is no optimizer's kernel " + name);
}

} // namespace zeroopt
