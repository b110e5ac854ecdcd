// Which rank steps which parameter, where each has to be stepped in one piece and may lie anywhere.
#pragma once

#include <cstdint>
#include <vector>

namespace zeroopt {

/// An owner for each parameter, such that the rank with the most to do has little more than the others.
///
/// Multiprocessor scheduling. Taken is the better of two: the costliest parameter to the rank with the least so far
/// (longest processing time first; Graham 1969), or MULTIFIT (Coffman, Garey, Johnson 1978), which looks for the least
/// load into which the parameters fit as into bins, the costliest first, each into the fullest that has room. Equal
/// costs on either side give the same owners everywhere.
///
/// @param costs of the parameters, >= 0.
/// @param loads what each rank has to do besides.
/// @return by parameter, the index of a rank.
std::vector<int64_t> assign_owners(const std::vector<int64_t>& costs, const std::vector<int64_t>& loads);

} // namespace zeroopt
