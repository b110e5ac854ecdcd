// pack: cast and scale. bytes: sizeof(src) + sizeof(dst).
#include "cpu/leaf/table.h"

#include "common/dtype.h"

namespace zeroopt::cpu::ZEROOPT_ISA {
namespace {

template <class Src, class Dst> void pack(const void* src, void* dst, int64_t numel, double scale) {
  using Value = typename Compute<Src, Dst>::type;
  const Src* in = static_cast<const Src*>(src);
  Dst* out = static_cast<Dst*>(dst);
  const Value factor = static_cast<Value>(scale);
  ZEROOPT_VECTORIZE
  for (int64_t i = 0; i < numel; ++i) {
    const Value value = static_cast<Value>(load(in[i])) * factor;
    // float64 goes to 16 bits by way of float32, as it does in torch.
    store(out[i], static_cast<typename Compute<Dst, Dst>::type>(value));
  }
}

} // namespace

const PackTable pack_table = {{
    {pack<float, float>, pack<float, double>, pack<float, BFloat16>, pack<float, Float16>},
    {pack<double, float>, pack<double, double>, pack<double, BFloat16>, pack<double, Float16>},
    {pack<BFloat16, float>, pack<BFloat16, double>, pack<BFloat16, BFloat16>, pack<BFloat16, Float16>},
    {pack<Float16, float>, pack<Float16, double>, pack<Float16, BFloat16>, pack<Float16, Float16>},
}};

} // namespace zeroopt::cpu::ZEROOPT_ISA
