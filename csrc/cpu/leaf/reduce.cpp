// reduce: the sum of slices as a binary tree. bytes: num_slices * sizeof(slice) + sizeof(out) * (base ? 2 : 1).
#include "cpu/leaf/table.h"

#include "common/dtype.h"
#include "cpu/leaf/stream.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

constexpr int64_t kGroup = 4;    // slices read side by side, a power of two: few enough streams to prefetch
constexpr int64_t kBlock = 2048; // elements of a partial sum; the few there are stay in the cache

/// The tree over elements i of `count` slices, at most kGroup.
template <int count, class Slice> ZEROOPT_INLINE auto sum_element(const Slice* const* slices, int64_t i) {
  constexpr int left = count > 2 ? 2 : 1;
  if constexpr (count == 1)
    return load(slices[0][i]);
  else
    return sum_element<left>(slices, i) + sum_element<count - left>(slices + left, i);
}

/// dest[i] = cast(base[i] + (left[i] + tree over slices[...][first + i])). base and left may be null. dest may be base
/// or one of the slices.
template <int count, class Slice, class Value, class Dest>
void add_slices(const Value* left, const void* const* slices, int64_t first, const Dest* base, Dest* dest,
                int64_t numel) {
  const Slice* from[count];
  for (int k = 0; k < count; ++k)
    from[k] = static_cast<const Slice*>(slices[k]) + first;
  auto add = [base, dest, numel](auto sum) {
    if (base == nullptr) {
      ZEROOPT_VECTORIZE
      for (int64_t i = 0; i < numel; ++i)
        store(dest[i], sum(i));
    } else {
      ZEROOPT_VECTORIZE
      for (int64_t i = 0; i < numel; ++i)
        store(dest[i], load(base[i]) + sum(i));
    }
  };
  if (left == nullptr)
    add([&from](int64_t i) { return sum_element<count>(from, i); });
  else
    add([&from, left](int64_t i) { return left[i] + sum_element<count>(from, i); });
}

/// The same for a count from 1 to kGroup.
template <class Slice, class Value, class Dest>
void add_group(const Value* left, const void* const* slices, int64_t count, int64_t first, const Dest* base, Dest* dest,
               int64_t numel) {
  switch (count) {
  case 1:
    return add_slices<1, Slice>(left, slices, first, base, dest, numel);
  case 2:
    return add_slices<2, Slice>(left, slices, first, base, dest, numel);
  case 3:
    return add_slices<3, Slice>(left, slices, first, base, dest, numel);
  default:
    return add_slices<kGroup, Slice>(left, slices, first, base, dest, numel);
  }
}

/// dest[i] = cast(base[i] + tree over slices[...][first + i]) for any count; numel is at most kBlock above kGroup.
/// base may be null. dest may be base or one of the slices: it is written to when every slice has been read.
template <class Slice, class Value, class Dest>
void add_tree(const void* const* slices, int64_t count, int64_t first, const Dest* base, Dest* dest, int64_t numel) {
  constexpr Value* none = nullptr;
  if (count <= kGroup) return add_group<Slice>(none, slices, count, first, base, dest, numel);
  int64_t split = kGroup;
  while (2 * split < count)
    split *= 2;
  alignas(64) Value left[kBlock];
  add_tree<Slice, Value>(slices, split, first, none, left, numel);
  if (count - split <= kGroup) return add_group<Slice>(left, slices + split, count - split, first, base, dest, numel);
  alignas(64) Value right[kBlock];
  add_tree<Slice, Value>(slices + split, count - split, first, none, right, numel);
  const void* rest = right;
  add_slices<1, Value>(left, &rest, 0, base, dest, numel);
}

/// Whether out is written to only, and too large for the cache.
template <class Out>
bool streams(const void* const* slices, int64_t num_slices, const void* base, const void* out, int64_t numel) {
  bool apart = out != base;
  for (int64_t k = 0; k < num_slices; ++k)
    apart = apart && out != slices[k];
  return apart && numel * static_cast<int64_t>(sizeof(Out)) >= kStreamBytes;
}

template <class Slice, class Out>
void reduce(const void* const* slices, int64_t num_slices, const void* base, void* out, int64_t begin, int64_t end) {
  using Value = typename Compute<Slice, Out>::type;
  const bool past_cache = streams<Out>(slices, num_slices, base, out, end - begin);
  const int64_t block = num_slices <= kGroup && !past_cache ? end - begin : kBlock;
  alignas(64) Out result[kBlock];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t numel = end - i < block ? end - i : block;
    const Out* base_block = base == nullptr ? nullptr : static_cast<const Out*>(base) + i;
    Out* out_block = static_cast<Out*>(out) + i;
    add_tree<Slice, Value>(slices, num_slices, i, base_block, past_cache ? result : out_block, numel);
    if (past_cache) stream(out_block, result, numel * static_cast<int64_t>(sizeof(Out)));
  }
  if (past_cache) finish_stream();
}

} // namespace

const ReduceTable reduce_table = {{
    {reduce<float, float>, nullptr, reduce<float, BFloat16>, reduce<float, Float16>},
    {nullptr, reduce<double, double>, nullptr, nullptr},
    {reduce<BFloat16, float>, nullptr, reduce<BFloat16, BFloat16>, nullptr},
    {reduce<Float16, float>, nullptr, nullptr, reduce<Float16, Float16>},
}};

} // namespace zeroopt::cpu::ZEROOPT_ISA
