// A stretch of memory that processes share, mapped into this one for as long as the object lives.
#pragma once

#include <cstdint>

namespace zeroopt {

/// Maps the first bytes of an open file, for reading and writing. The descriptor may be closed afterwards: with
/// thousands of buckets, each mapped from every peer, descriptors would run out (Python's mmap keeps them).
class SharedMapping {
public:
  /// @throws std::system_error when the kernel refuses.
  SharedMapping(int fd, int64_t bytes);
  ~SharedMapping();
  SharedMapping(const SharedMapping&) = delete;
  SharedMapping& operator=(const SharedMapping&) = delete;

  void* address() const { return address_; }
  int64_t bytes() const { return bytes_; }

private:
  void* address_;
  int64_t bytes_;
};

} // namespace zeroopt
