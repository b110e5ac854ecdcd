// What processors move between caches as one.
#pragma once

#include <cstddef>

namespace zeroopt {

/// Of x86-64 and of Arm's servers. Where it is longer (A64FX: 256, Apple: 128), neighbours wait for each other now and
/// then; nothing else depends on it.
constexpr size_t kCacheLineBytes = 64;

} // namespace zeroopt
