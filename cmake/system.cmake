# Refuses systems and processors on which zeroopt could not run: ranks of a host share memory by what only Linux has
# (memfd_create, /proc, futexes), and tables of addresses and random bits are laid out for 64 bits, the lowest first.
set(unfit "")
if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  set(unfit "${CMAKE_SYSTEM_NAME}")
elseif(CMAKE_CXX_BYTE_ORDER STREQUAL "BIG_ENDIAN")
  set(unfit "a big-endian processor, ${CMAKE_SYSTEM_PROCESSOR}")
elseif(NOT CMAKE_SIZEOF_VOID_P EQUAL 8)
  set(unfit "32 bits")
endif()
if(unfit)
  message(FATAL_ERROR "zeroopt needs Linux on a 64-bit little-endian processor, and this is a build for ${unfit}. "
    "On macOS and Windows, install it in a container or a virtual machine with Linux, on x86-64 or 64-bit Arm.")
endif()
