// The formats of parameters and states that the step is compiled for one by one, and those that one kernel branches on.
//
// A branch for each array costs registers, and with them warps that run at once: 96 instead of 80 for AdamW. And 16
// bits that a branch has loaded are waited for before the next branch loads its own. Formats that training mostly uses
// are therefore constants, in kernels of their own; there are too many others to compile each. Gradients are of any
// dtype in all kernels, for they are loaded last.
#pragma once

#include "kernels.h"

namespace zeroopt::cuda {

template <ParamFormat p, StateFormat s> struct KnownFormats {
  static constexpr ParamFormat param = p;
  static constexpr StateFormat state = s;
};

struct AnyFormats {
  ParamFormat param;
  StateFormat state;
};

template <class... Formats> struct FormatsList {};

using CompiledFormats = FormatsList<KnownFormats<ParamFormat::float32, StateFormat::float32>,
                                    KnownFormats<ParamFormat::bfloat16_master, StateFormat::float32>,
                                    KnownFormats<ParamFormat::float16_master, StateFormat::float32>,
                                    KnownFormats<ParamFormat::bfloat16_remainder, StateFormat::float32>,
                                    KnownFormats<ParamFormat::bfloat16_remainder, StateFormat::int8>,
                                    KnownFormats<ParamFormat::bfloat16_stochastic, StateFormat::bfloat16>>;

/// Blocks of a step that a multiprocessor of 65536 registers runs at once, at least: what the compiler keeps its use of
/// registers down for. Where three would make it spill, two.
template <class Formats> constexpr int kStepBlocks = 2;
template <ParamFormat p> constexpr int kStepBlocks<KnownFormats<p, StateFormat::float32>> = 3;

template <class Body, class... Formats>
bool call_with_formats(const Storage& storage, const Body& body, FormatsList<Formats...>) {
  return ((storage.param == Formats::param && storage.state == Formats::state && (body(Formats{}), true)) || ...);
}

/// Calls body(formats) with KnownFormats where the step is compiled for them, else with AnyFormats.
template <class Body> void with_formats(const Storage& storage, const Body& body) {
  if (!call_with_formats(storage, body, CompiledFormats{})) body(AnyFormats{storage.param, storage.state});
}

} // namespace zeroopt::cuda
