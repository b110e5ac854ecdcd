// The instruction sets this build has leaf functions for, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/leaf/table.h"

namespace zeroopt::cpu {

struct Isa {
  const char* name;
  const LeafTable* leaves;
  int (*vector_bytes)(); ///< of a vector on this processor, under its operating system; 0 where they do not support it
};

/// All instruction sets in this build, from the plainest to the widest.
const std::vector<Isa>& compiled_isas();

/// The one with the longest vectors, the plainer one of two with equally long ones, or the one the environment variable
/// ZEROOPT_CPU_ISA names; chosen at the first call.
/// @throws std::runtime_error when ZEROOPT_CPU_ISA is unknown, not in this build, or not supported by this machine.
const Isa& isa();

} // namespace zeroopt::cpu
