#include "cpu/shm_mapping.h"

#include <cerrno>
#include <system_error>

#include <sys/mman.h>

namespace zeroopt {

SharedMapping::SharedMapping(int fd, int64_t bytes)
    : address_(mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)), bytes_(bytes) {
  if (address_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "cannot map shared memory");
}

SharedMapping::~SharedMapping() {
  munmap(address_, static_cast<size_t>(bytes_));
}

} // namespace zeroopt
