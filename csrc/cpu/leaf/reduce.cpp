// reduce: the sum of slices in order. bytes: num_slices * sizeof(slice) + sizeof(out) * (base ? 2 : 1).
#include "cpu/leaf/table.h"

#include "common/dtype.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

constexpr int64_t kBlock = 2048; // accumulators; they stay in the first level cache
constexpr int64_t kGroup = 4;    // slices read side by side: enough streams to keep memory busy, few enough to prefetch

/// sum[i] = start[i] + slices[0][first + i] + ... + slices[count - 1][first + i], in that order; start may be sum.
template <int count, class Start, class Slice, class Value>
void add_slices(const Start* start, const void* const* slices, int64_t first, Value* sum, int64_t numel) {
  const Slice* from[count];
  for (int k = 0; k < count; ++k)
    from[k] = static_cast<const Slice*>(slices[k]) + first;
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i) {
    Value value = load(start[i]);
    for (int k = 0; k < count; ++k)
      value += load(from[k][i]);
    sum[i] = value;
  }
}

template <class Start, class Slice, class Value>
void add_group(const Start* start, const void* const* slices, int64_t count, int64_t first, Value* sum, int64_t numel) {
  switch (count) {
  case 1:
    return add_slices<1, Start, Slice>(start, slices, first, sum, numel);
  case 2:
    return add_slices<2, Start, Slice>(start, slices, first, sum, numel);
  case 3:
    return add_slices<3, Start, Slice>(start, slices, first, sum, numel);
  default:
    return add_slices<kGroup, Start, Slice>(start, slices, first, sum, numel);
  }
}

/// out[i] = cast(base[i] + sum[i]); base may be null.
template <class Sum, class Out> void finish(const Sum* sum, const Out* base, Out* out, int64_t numel) {
  if (base == nullptr) {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      store(out[i], load(sum[i]));
  } else {
    ZEROOPT_VECTORIZE
    for (int64_t i = 0; i < numel; ++i)
      store(out[i], load(base[i]) + load(sum[i]));
  }
}

template <class Slice, class Out>
void reduce(const void* const* slices, int64_t num_slices, const void* base, void* out, int64_t begin, int64_t end) {
  using Value = typename Compute<Slice, Out>::type;
  alignas(64) Value sum[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t numel = end - i < kBlock ? end - i : kBlock;
    const Slice* first_slice = static_cast<const Slice*>(slices[0]) + i;
    const Out* base_block = base == nullptr ? nullptr : static_cast<const Out*>(base) + i;
    Out* out_block = static_cast<Out*>(out) + i;
    if (num_slices == 1) {
      finish(first_slice, base_block, out_block, numel);
      continue;
    }
    for (int64_t k = 1; k < num_slices; k += kGroup) {
      const int64_t count = num_slices - k < kGroup ? num_slices - k : kGroup;
      if (k == 1) {
        add_group<Slice, Slice>(first_slice, slices + k, count, i, sum, numel);
      } else {
        add_group<Value, Slice>(sum, slices + k, count, i, sum, numel);
      }
    }
    finish(sum, base_block, out_block, numel);
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
