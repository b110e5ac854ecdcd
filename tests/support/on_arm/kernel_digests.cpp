// Prints the instruction set, runs every CPU kernel on made-up arrays, and prints a digest of each result, a line each.
// Processors of two kinds must print the same digests. The result of a call must not depend on the number of threads.
//
//     kernel_digests [--isa]    --isa: the instruction set alone
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/wire_code.h"
#include "cpu/isa.h"
#include "ops/by_name.h"

using namespace zeroopt;

namespace {

const std::vector<int64_t> kLengths = {0, 1, 7, 16, 31, 65, 257, 1025};
constexpr int64_t kManyElements = 140'001; // enough for two threads of any kernel
const DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};
const DType kFloats[] = {DType::float32, DType::bfloat16, DType::float16}; // that gradients may have

using Bytes = std::vector<uint8_t>;

/// splitmix64: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
class Random {
public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  /// From 2^-20 to 2^4, of either sign.
  float value() {
    const uint64_t drawn = bits();
    const uint32_t exponent = 127u - 20u + static_cast<uint32_t>(drawn >> 40) % 24u;
    return float_of((static_cast<uint32_t>(drawn) & 0x807fffffu) | exponent << 23);
  }

  /// A 16-bit pattern that is finite: the sum of two NaN is no certain one.
  uint16_t finite(uint16_t exponent_mask) {
    const uint16_t drawn = static_cast<uint16_t>(bits());
    return (drawn & exponent_mask) == exponent_mask ? uint16_t{0} : drawn;
  }

private:
  uint64_t state_;
};

template <class T> T* as(Bytes& bytes, int64_t index = 0) {
  return reinterpret_cast<T*>(bytes.data()) + index;
}

Bytes zeros(int64_t numel, int64_t item_bytes) {
  return Bytes(static_cast<size_t>(numel * item_bytes));
}

/// Finite elements: of all exponents for 16 bits, of a few for others.
Bytes elements(DType dtype, int64_t numel, Random& random) {
  Bytes made = zeros(numel, dtype_bytes(dtype));
  for (int64_t i = 0; i < numel; ++i) {
    if (dtype == DType::float32)
      *as<float>(made, i) = random.value();
    else if (dtype == DType::float64)
      *as<double>(made, i) = random.value() * (1.0 + 0x1p-40 * random.value());
    else
      *as<uint16_t>(made, i) = random.finite(dtype == DType::bfloat16 ? 0x7f80 : 0x7c00);
  }
  return made;
}

Bytes floats(int64_t numel, bool is_signed, Random& random) {
  Bytes made = elements(DType::float32, numel, random);
  for (int64_t i = 0; i < numel && !is_signed; ++i)
    *as<uint32_t>(made, i) &= 0x7fffffffu;
  return made;
}

Bytes as_bfloat16(Bytes values, int64_t numel) {
  Bytes made = zeros(numel, 2);
  for (int64_t i = 0; i < numel; ++i)
    *as<uint16_t>(made, i) = float_to_bfloat16(*as<float>(values, i));
  return made;
}

/// Eight bytes at a time, as FNV-1a takes one; lengths count.
uint64_t digest_of(const std::vector<Bytes>& arrays) {
  uint64_t digest = 0xcbf29ce484222325u;
  const auto take = [&](uint64_t word) {
    digest = (digest ^ word) * 0x100000001b3u;
    digest ^= digest >> 29;
  };
  for (const Bytes& array : arrays) {
    take(array.size());
    for (size_t i = 0; i < array.size(); i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, array.data() + i, std::min<size_t>(8, array.size() - i));
      take(word);
    }
  }
  return digest;
}

/// run(num_threads) returns what the kernel has written.
template <class Run> void print(const std::string& name, const Run& run) {
  const uint64_t digest = digest_of(run(1));
  if (digest_of(run(3)) != digest) {
    std::fprintf(stderr, "%s depends on the number of threads\n", name.c_str());
    std::exit(1);
  }
  std::printf("%s: %016llx\n", name.c_str(), static_cast<unsigned long long>(digest));
}

std::string joined(const std::string& name, std::initializer_list<int64_t> numbers) {
  std::string text = name;
  for (int64_t number : numbers)
    text += " " + std::to_string(number);
  return text;
}

void print_pack(int64_t numel) {
  for (DType src : kDTypes)
    for (DType dst : kDTypes) {
      Random random(static_cast<uint64_t>(numel));
      Bytes values = elements(src, numel, random);
      print(joined("pack", {dtype_index(src), dtype_index(dst), numel}), [&](int threads) {
        Bytes out = zeros(numel, dtype_bytes(dst));
        cpu::pack(values.data(), src, out.data(), dst, numel, 0.3, threads);
        return std::vector<Bytes>{out};
      });
    }
}

void print_reduce(DType src, DType dst, int64_t num_slices, int64_t numel) {
  Random random(static_cast<uint64_t>(numel));
  std::vector<Bytes> slices;
  std::vector<const void*> addresses;
  for (int64_t i = 0; i < num_slices; ++i)
    slices.push_back(elements(src, numel, random));
  for (const Bytes& slice : slices)
    addresses.push_back(slice.data());
  Bytes base = elements(dst, numel, random);
  print(joined("reduce", {dtype_index(src), dtype_index(dst), num_slices, numel}), [&](int threads) {
    Bytes out = zeros(numel, dtype_bytes(dst)), sum = zeros(numel, dtype_bytes(dst));
    cpu::reduce(addresses.data(), num_slices, src, base.data(), out.data(), dst, numel, threads);
    cpu::reduce(addresses.data(), num_slices, src, nullptr, sum.data(), dst, numel, threads);
    return std::vector<Bytes>{out, sum};
  });
}

void print_reduces(int64_t numel) {
  using Pair = std::pair<DType, DType>;
  for (DType dtype : kDTypes)
    for (int64_t num_slices : {1, 2, 3, 4, 8, 13})
      print_reduce(dtype, dtype, num_slices, numel);
  for (Pair pair : {Pair(DType::bfloat16, DType::float32), Pair(DType::float16, DType::float32),
                    Pair(DType::float32, DType::bfloat16), Pair(DType::float32, DType::float16)})
    for (int64_t num_slices : {1, 6})
      print_reduce(pair.first, pair.second, num_slices, numel);
}

void print_copy(int64_t bytes) {
  Random random(static_cast<uint64_t>(bytes));
  Bytes values = elements(DType::float16, (bytes + 1) / 2, random);
  print(joined("copy", {bytes}), [&](int threads) {
    Bytes out = zeros(bytes, 1);
    cpu::copy(values.data(), out.data(), bytes, threads);
    return std::vector<Bytes>{out};
  });
}

void print_quantize(bool is_signed, int64_t numel) {
  Random random(static_cast<uint64_t>(numel));
  Bytes values = floats(numel, is_signed, random);
  for (int64_t i = 300; i + 1 < numel; i += 1000) {
    *as<uint32_t>(values, i) = 0x7f800000u;     // infinity
    *as<uint32_t>(values, i + 1) = 0x7fc00000u; // NaN
  }
  print(joined("quantize", {is_signed, numel}), [&](int threads) {
    Bytes codes = zeros(numel, 1), scales = zeros(num_quant_blocks(numel), 4), decoded = zeros(numel, 4);
    cpu::quantize(as<float>(values), as<uint8_t>(codes), as<float>(scales), numel, is_signed, threads);
    cpu::dequantize(as<uint8_t>(codes), as<float>(scales), as<float>(decoded), numel, is_signed, threads);
    return std::vector<Bytes>{codes, scales, decoded};
  });
}

void print_wire_code(DType dtype, int bits, int64_t numel) {
  constexpr int64_t kSlices = 3;
  Random random(static_cast<uint64_t>(numel));
  Bytes values = elements(dtype, numel * kSlices, random);
  const Bytes before = elements(DType::bfloat16, numel * kSlices, random);
  if (dtype == DType::float32 && numel > 256) *as<uint32_t>(values, 300) = 0x7f800000u;
  const int64_t slice_bytes = wire_bytes(numel, bits);
  print(joined("wire code", {dtype_index(dtype), bits, numel}), [&](int threads) {
    Bytes residual = before, encoded = zeros(kSlices * slice_bytes, 1), out = zeros(numel, dtype_bytes(dtype));
    cpu::encode_slices(values.data(), dtype, as<uint16_t>(residual), encoded.data(), numel, kSlices, bits,
                       0x8000000000000005u, 3, 0x80000001u, threads);
    std::vector<const uint8_t*> slices;
    for (int64_t i = 0; i < kSlices; ++i)
      slices.push_back(encoded.data() + i * slice_bytes);
    cpu::sum_encoded(slices.data(), kSlices, bits, nullptr, out.data(), dtype, numel, threads);
    return std::vector<Bytes>{residual, encoded, out};
  });
}

void print_parts(bool squared, int64_t numel) {
  Random random(static_cast<uint64_t>(numel));
  Bytes values = floats(numel, true, random);
  const double rounders[kSumParts] = {1.5 * 0x1p40, 1.5 * 0x1p20, 1.5 * 0x1p0};
  print(joined("sum_in_parts", {squared, numel}), [&](int threads) {
    Bytes sums = zeros(kSumParts, 8);
    cpu::sum_in_parts(as<float>(values), numel, 0.5, squared, rounders, as<double>(sums), threads);
    return std::vector<Bytes>{sums};
  });
}

/// Arrays of segments, cut at random places, with an element between them that is nobody's.
class Segments {
public:
  Segments(const Storage& storage, const std::vector<bool>& signed_states, int64_t num_groups, int64_t numel)
      : storage_(storage), random_(static_cast<uint64_t>(numel)) {
    const bool remainders = storage.param == ParamFormat::bfloat16_remainder;
    const DType param = storage.param == ParamFormat::float32          ? DType::float32
                        : storage.param == ParamFormat::float16_master ? DType::float16
                                                                       : DType::bfloat16;
    param_ = param == DType::float32 ? floats(numel, true, random_) : as_bfloat16(floats(numel, true, random_), numel);
    master_ = remainders ? elements(DType::bfloat16, numel, random_) : floats(numel, true, random_);
    grad_ = storage.grad == DType::bfloat16 ? as_bfloat16(floats(numel, true, random_), numel)
                                            : elements(storage.grad, numel, random_);
    for (bool is_signed : signed_states)
      add_state(is_signed, numel);
    cut(numel, num_groups);
    const int64_t count = static_cast<int64_t>(rows_.size());
    active_.assign(rows_.size(), 1);
    if (count > 2) active_[2] = 0;
    steps_ = zeros(2 * count, 4);
    for (int64_t i = 0; i < count; ++i)
      *as<float>(steps_, i) = static_cast<float>(1 + i); // before the first, a second pass would divide 0 by 0
    squares_ = zeros(2 * count, 8);
    for (int64_t i = 0; i < 2 * count; ++i)
      *as<double>(squares_, i) = 1.0 + static_cast<double>(random_.bits() % 1000u);
  }

  SegmentTable table() {
    return {rows_.data(), active_.data(), as<float>(steps_), as<double>(squares_), static_cast<int64_t>(rows_.size())};
  }

  std::vector<Bytes> written() const {
    std::vector<Bytes> arrays = {param_, master_, steps_, squares_};
    arrays.insert(arrays.end(), states_.begin(), states_.end());
    arrays.insert(arrays.end(), scales_.begin(), scales_.end());
    return arrays;
  }

private:
  void add_state(bool is_signed, int64_t numel) {
    Bytes values = floats(numel, is_signed, random_);
    const bool in_codes = storage_.state == StateFormat::int8;
    if (storage_.state == StateFormat::bfloat16) values = as_bfloat16(values, numel);
    if (in_codes)
      for (int64_t i = 0; i < numel; ++i)
        values[static_cast<size_t>(i)] = static_cast<uint8_t>(random_.bits());
    states_.push_back(values);
    scales_.push_back(in_codes ? floats(kMaxSegments * (num_quant_blocks(numel) + 1), false, random_) : Bytes());
  }

  void cut(int64_t numel, int64_t num_groups) {
    const uint64_t longest = static_cast<uint64_t>(numel / kMaxSegments * 2 + 1);
    for (int64_t begin = 1, i = 0; begin < numel; ++i) {
      const int64_t drawn = 1 + static_cast<int64_t>(random_.bits() % longest);
      const int64_t length = i + 1 == kMaxSegments ? numel - begin : std::min(drawn, numel - begin);
      rows_.push_back(row(begin, length, i, i % num_groups, i * (num_quant_blocks(numel) + 1)));
      begin += length + 1;
    }
  }

  SegmentRow row(int64_t begin, int64_t numel, int64_t number, int64_t group, int64_t first_scale) {
    const ParamFormat format = storage_.param;
    const bool has_master = format != ParamFormat::float32 && format != ParamFormat::bfloat16_stochastic;
    const int64_t state_bytes = storage_.state == StateFormat::float32    ? 4
                                : storage_.state == StateFormat::bfloat16 ? 2
                                                                          : 1;
    SegmentRow made = {};
    made.numel = numel;
    made.group = group;
    made.key = number;
    made.first = 3 * number;
    made.param = param_.data() + begin * (format == ParamFormat::float32 ? 4 : 2);
    if (has_master) made.master = master_.data() + begin * (format == ParamFormat::bfloat16_remainder ? 2 : 4);
    made.grad = grad_.data() + begin * dtype_bytes(storage_.grad);
    for (size_t k = 0; k < states_.size(); ++k) {
      made.states[k] = states_[k].data() + begin * state_bytes;
      if (!scales_[k].empty()) made.scales[k] = as<float>(scales_[k], first_scale);
    }
    return made;
  }

  static constexpr int64_t kMaxSegments = 40;

  Storage storage_;
  Random random_;
  Bytes param_, master_, grad_, steps_, squares_;
  std::vector<Bytes> states_, scales_;
  std::vector<SegmentRow> rows_;
  std::vector<uint8_t> active_;
};

/// The value of a hyper-parameter that an optimizer's formula has by this name.
double usual(const std::string& name) {
  const std::pair<const char*, double> values[] = {
      {"lr", 0.1},    {"beta1", 0.9},    {"beta2", 0.95},    {"eps", 1e-8},     {"weight_decay", 0.1},
      {"alpha", 0.9}, {"momentum", 0.9}, {"dampening", 0.5}, {"lr_decay", 0.1},
  };
  for (const auto& [known, value] : values)
    if (name == known) return value;
  return 0.0; // a flag
}

/// Every set of flags, with and without weight decay and momentum, as a table of groups.
template <class Op> std::vector<double> groups_of() {
  std::vector<double> row;
  std::vector<size_t> switches;
  const std::string names = std::string(Op::kColumns) + ", ";
  for (size_t begin = 0, end; (end = names.find(", ", begin)) != std::string::npos; begin = end + 2) {
    const std::string name = names.substr(begin, end - begin);
    row.push_back(usual(name));
    if (row.back() == 0.0 || name == "weight_decay" || name == "momentum") switches.push_back(row.size() - 1);
  }
  std::vector<double> table;
  for (unsigned chosen = 0; chosen < 1u << switches.size(); ++chosen) {
    std::vector<double> group = row;
    for (size_t i = 0; i < switches.size(); ++i)
      if (chosen >> i & 1u) group[switches[i]] = row[switches[i]] == 0.0 ? 1.0 : 0.0;
    table.insert(table.end(), group.begin(), group.end());
  }
  return table;
}

template <class Op> void print_step(const Storage& storage, int64_t numel) {
  const std::vector<double> groups = groups_of<Op>();
  const int64_t num_groups = static_cast<int64_t>(groups.size() * sizeof(double) / sizeof(typename Op::Group));
  std::vector<bool> signed_states;
  for (const State& state : Op::kStates)
    signed_states.push_back(state.is_signed);
  const float grad_scale = 3.0f, clip_coef = 0.7f, found_inf = 0.0f;
  const StepControl control = {&grad_scale, &clip_coef, &found_inf, 0x8000000000003039u};
  const std::string name = joined(kernel_name<Op>(), {static_cast<int64_t>(storage.param), dtype_index(storage.grad),
                                                      static_cast<int64_t>(storage.state), numel});
  print(name, [&](int threads) {
    Segments segments(storage, signed_states, num_groups, numel);
    cpu::step(kernel_name<Op>(), segments.table(), storage, groups.data(), control, threads);
    return segments.written();
  });
}

template <class Op> void print_steps() {
  for (int param = 0; param < 5; ++param)
    for (DType grad : kFloats)
      for (int state = 0; state < 3; ++state)
        print_step<Op>({static_cast<ParamFormat>(param), grad, static_cast<StateFormat>(state)}, 1500);
  print_step<Op>({ParamFormat::float32, DType::float32, StateFormat::float32}, 40'001);
  print_step<Op>({ParamFormat::bfloat16_remainder, DType::bfloat16, StateFormat::int8}, 40'001);
  print_step<Op>({ParamFormat::bfloat16_stochastic, DType::float16, StateFormat::bfloat16}, 40'001);
}

template <class... Ops> void print_all_steps(OpList<Ops...>) {
  (print_steps<Ops>(), ...);
}

void print_norms(DType grad, int64_t numel) {
  print(joined("squared_norms", {dtype_index(grad), numel}), [&](int threads) {
    Segments segments({ParamFormat::float32, grad, StateFormat::float32}, {}, 1, numel);
    Bytes found_inf = zeros(1, 4);
    cpu::squared_norms(segments.table(), grad, as<float>(found_inf), threads);
    std::vector<Bytes> arrays = segments.written();
    arrays.push_back(found_inf);
    return arrays;
  });
}

void print_lengths(int64_t numel) {
  print_pack(numel);
  print_reduces(numel);
  print_copy(9 * numel); // a part of the largest goes past the cache
  for (bool flag : {false, true}) {
    print_quantize(flag, numel);
    print_parts(flag, numel);
  }
  for (DType dtype : kFloats) {
    print_norms(dtype, numel);
    for (int bits : {4, 8})
      print_wire_code(dtype, bits, numel);
  }
}

} // namespace

int main(int argc, char** argv) {
  try {
    std::printf("isa: %s, vectors of %d bytes\n", cpu::isa().name, cpu::isa().vector_bytes());
  } catch (const std::exception& refused) {
    std::fprintf(stderr, "%s\n", refused.what());
    return 1;
  }
  if (argc > 1 && std::string(argv[1]) == "--isa") return 0;
  for (int64_t numel : kLengths)
    print_lengths(numel);
  print_lengths(kManyElements);
  print_all_steps(AllOps{});
}
