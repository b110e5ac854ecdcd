// How many arrays lie in memory, and whether tensors that a framework hands over do so, without a call in Python for
// each. What there is to a tensor is read through DLPack's C exchange API (dmlc/dlpack 1.3, `DLPackExchangeAPI`), a
// table of functions that torch 2.10 and later offer: no library of the framework's is linked.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace zeroopt {

/// As DLPack has them, where its version 1 does.
namespace dlpack {

struct Device {
  int32_t type;
  int32_t number;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

/// DLTensor.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides; ///< in elements; null: contiguous
  uint64_t byte_offset;
};

/// DLPackExchangeAPI.
struct Exchange {
  uint32_t major_version;
  uint32_t minor_version;
  Exchange* before;
  int (*allocate)();           // not called
  int (*from_object)();        // not called
  int (*to_object)();          // not called
  int (*look)(void*, Tensor*); ///< tells what a Python object is; 0, or -1 with an exception set. May be null.
  int (*current_stream)();     // not called
};

constexpr uint32_t kMajorVersion = 1;

} // namespace dlpack

/// Whether two tensors are of one dtype and on one device.
bool is_alike(const dlpack::Tensor& a, const dlpack::Tensor& b);

/// Whether tensors are laid out as arrays of these shapes and strides.
class Layouts {
public:
  /// @param shapes, strides for each array as many numbers as it has dimensions.
  /// @throws std::invalid_argument lengths do not fit.
  Layouts(const std::vector<std::vector<int64_t>>& shapes, const std::vector<std::vector<int64_t>>& strides);

  int64_t count() const { return static_cast<int64_t>(ends_.size()); }

  /// Whether a tensor lies as array number `i`.
  bool has(int64_t i, const dlpack::Tensor& tensor) const;

private:
  std::vector<int64_t> ends_;    // of each array's numbers in both of these
  std::vector<int64_t> shapes_;  // of all arrays, one behind the other
  std::vector<int64_t> strides_; // likewise
};

} // namespace zeroopt
