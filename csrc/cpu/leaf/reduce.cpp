// reduce: the sum of slices in order. bytes: num_slices * sizeof(slice) + sizeof(out) * (base ? 2 : 1).
#include "cpu/leaf/table.h"

#include "common/dtype.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

constexpr int64_t kBlock = 2048; // accumulators; they stay in the first level cache
constexpr int64_t kGroup = 3;    // slices read side by side with the sum so far: few enough streams to prefetch

/// dest[i] = cast(base[i] + (start[i] + slices[0][first + i] + ... + slices[count - 1][first + i])), in that order.
/// dest may be start or base; base may be null.
template <int count, class Slice, class Start, class Dest>
void add_slices(const Start* start, const void* const* slices, int64_t first, const Dest* base, Dest* dest,
                int64_t numel) {
  const Slice* from[count > 0 ? count : 1] = {};
  for (int k = 0; k < count; ++k)
    from[k] = static_cast<const Slice*>(slices[k]) + first;
  auto sum = [start, &from](int64_t i) {
    auto value = static_cast<typename Compute<Start, Slice>::type>(load(start[i]));
    for (int k = 0; k < count; ++k)
      value += load(from[k][i]);
    return value;
  };
  if (base == nullptr) {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      store(dest[i], sum(i));
  } else {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      store(dest[i], load(base[i]) + sum(i));
  }
}

/// The same for a count from 0 to kGroup.
template <class Slice, class Start, class Dest>
void add_group(const Start* start, const void* const* slices, int64_t count, int64_t first, const Dest* base,
               Dest* dest, int64_t numel) {
  switch (count) {
  case 0:
    return add_slices<0, Slice>(start, slices, first, base, dest, numel);
  case 1:
    return add_slices<1, Slice>(start, slices, first, base, dest, numel);
  case 2:
    return add_slices<2, Slice>(start, slices, first, base, dest, numel);
  default:
    return add_slices<kGroup, Slice>(start, slices, first, base, dest, numel);
  }
}

template <class Slice, class Out>
void reduce(const void* const* slices, int64_t num_slices, const void* base, void* out, int64_t begin, int64_t end) {
  using Value = typename Compute<Slice, Out>::type;
  constexpr Value* none = nullptr;
  alignas(64) Value sum[kBlock];
  const int64_t last = num_slices > 1 ? (num_slices - 2) / kGroup * kGroup + 1 : 1; // first slice of the last group
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t numel = end - i < kBlock ? end - i : kBlock;
    const Slice* start = static_cast<const Slice*>(slices[0]) + i;
    const Out* base_block = base == nullptr ? nullptr : static_cast<const Out*>(base) + i;
    Out* out_block = static_cast<Out*>(out) + i;
    if (last == 1) {
      add_group<Slice>(start, slices + 1, num_slices - 1, i, base_block, out_block, numel);
      continue;
    }
    add_group<Slice>(start, slices + 1, kGroup, i, none, sum, numel);
    for (int64_t k = 1 + kGroup; k < last; k += kGroup)
      add_group<Slice>(sum, slices + k, kGroup, i, none, sum, numel);
    add_group<Slice>(sum, slices + last, num_slices - last, i, base_block, out_block, numel);
  }
}

} // namespace

const ReduceTable reduce_table = {{
    {reduce<float, float>, nullptr, reduce<float, BFloat16>, reduce<float, Float16>},
    {nullptr, reduce<double, double>, nullptr, nullptr},
    {reduce<BFloat16, float>, nullptr, reduce<BFloat16, BFloat16>, nullptr},
    {reduce<Float16, float>, nullptr, nullptr, reduce<Float16, Float16>},
}};

} // namespace zeroopt::cpu::ZEROOPT_ISA
