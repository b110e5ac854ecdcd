#include "layouts.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace zeroopt {

bool is_alike(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits && a.dtype.lanes == b.dtype.lanes &&
         a.device.type == b.device.type && a.device.number == b.device.number;
}

Layouts::Layouts(const std::vector<std::vector<int64_t>>& shapes, const std::vector<std::vector<int64_t>>& strides) {
  if (shapes.size() != strides.size()) throw std::invalid_argument("expected as many strides as shapes");
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (shapes[i].size() != strides[i].size())
      throw std::invalid_argument("expected a stride for each dimension of array " + std::to_string(i));
    shapes_.insert(shapes_.end(), shapes[i].begin(), shapes[i].end());
    strides_.insert(strides_.end(), strides[i].begin(), strides[i].end());
    ends_.push_back(static_cast<int64_t>(shapes_.size()));
  }
}

bool Layouts::has(int64_t i, const dlpack::Tensor& tensor) const {
  const int64_t begin = i == 0 ? 0 : ends_[i - 1], ndim = ends_[i] - begin;
  return tensor.ndim == ndim && (ndim == 0 || tensor.strides != nullptr) &&
         std::equal(tensor.shape, tensor.shape + ndim, shapes_.begin() + begin) &&
         std::equal(tensor.strides, tensor.strides + ndim, strides_.begin() + begin);
}

} // namespace zeroopt
