// Errors that Python shows as its own exceptions.
#pragma once

#include <stdexcept>
#include <string>

namespace zeroopt {

/// A kernel that this build does not contain was called: zeroopt.errors.KernelUnavailableError.
class KernelUnavailable : public std::runtime_error {
public:
  explicit KernelUnavailable(const std::string& what) : std::runtime_error(what) {}
};

} // namespace zeroopt
