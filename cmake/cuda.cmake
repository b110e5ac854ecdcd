# The CUDA kernels, or their stand-ins that raise. Sets ZEROOPT_WITH_CUDA, ZEROOPT_CUDA_SOURCES and ZEROOPT_CUDA_ARCHS, or why
# there are none, ZEROOPT_CUDA_PROBLEM.
#
# ZEROOPT_CUDA (environment or -D): auto compiles them when there is a CUDA compiler that works, on demands one, off does
# without.
set(ZEROOPT_WITH_CUDA 0)
set(ZEROOPT_CUDA_ARCHS "")
set(ZEROOPT_CUDA_PROBLEM "")
set(ZEROOPT_CUDA_SOURCES csrc/cuda/unavailable.cpp)

set(wanted "auto")
if(DEFINED ZEROOPT_CUDA)
  set(wanted "${ZEROOPT_CUDA}")
elseif(NOT "$ENV{ZEROOPT_CUDA}" STREQUAL "")
  set(wanted "$ENV{ZEROOPT_CUDA}")
endif()
if(NOT wanted MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "ZEROOPT_CUDA must be auto, on or off, got \"${wanted}\"")
endif()
if(wanted STREQUAL "off")
  set(ZEROOPT_CUDA_PROBLEM "it was built with ZEROOPT_CUDA=off")
  return()
endif()

include(${CMAKE_CURRENT_LIST_DIR}/cuda_archs.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/try_cuda.cmake)

if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
  find_program(ZEROOPT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(ZEROOPT_NVCC)
    set(CMAKE_CUDA_COMPILER ${ZEROOPT_NVCC})
  endif()
endif()

zeroopt_try_cuda(problem)
if(problem)
  if(wanted STREQUAL "on")
    message(FATAL_ERROR "ZEROOPT_CUDA=on, but there are no CUDA kernels to be had:\n  ${problem}")
  endif()
  message(STATUS "CPU kernels only: ${problem}")
  string(REGEX REPLACE " \\(what CMake says is in .*" "" ZEROOPT_CUDA_PROBLEM "when it was built, ${problem}")
  return()
endif()

zeroopt_asked_archs(ZEROOPT_CUDA_ARCHS)

# The compiler is tried out with one architecture, its default; the sources are compiled for all of them.
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(ZEROOPT_CUDA_ARCHS STREQUAL "")
  zeroopt_default_archs(ZEROOPT_CUDA_ARCHS)
endif()

set(warnings -Wall,-Wextra)
if(ZEROOPT_WERROR)
  string(APPEND warnings ",-Werror")
endif()
add_library(cuda_kernels OBJECT
  csrc/cuda/steps.cu
  csrc/cuda/try_launch.cu
  csrc/cuda/pack.cu csrc/cuda/pack_segments.cu
  csrc/cuda/reduce.cu
  csrc/cuda/norm.cu
  csrc/cuda/quantize.cu
  csrc/cuda/wire_code.cu)
zeroopt_generate_code("${ZEROOPT_CUDA_ARCHS}" code)
if(code)
  target_compile_options(cuda_kernels PRIVATE ${code})
else()
  set_target_properties(cuda_kernels PROPERTIES CUDA_ARCHITECTURES "${ZEROOPT_CUDA_ARCHS}")
endif()
target_include_directories(cuda_kernels PRIVATE csrc)
# -fmad=false: the same roundings as on the CPU.
target_compile_options(cuda_kernels PRIVATE -fmad=false --threads=2 -Xcompiler=${warnings}
  $<$<BOOL:${ZEROOPT_WERROR}>:--Werror=all-warnings>)

# Smaller by zstd, which drivers that CUDA 13 asks for unpack; those of CUDA 12 unpack what all of CUDA 12's nvcc can pack.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
  target_compile_options(cuda_kernels PRIVATE --compress-mode=size)
else()
  target_compile_options(cuda_kernels PRIVATE -Xfatbin=-compress-all)
endif()

set(ZEROOPT_WITH_CUDA 1)
set(ZEROOPT_CUDA_SOURCES $<TARGET_OBJECTS:cuda_kernels>)
message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} kernels for ${ZEROOPT_CUDA_ARCHS}")
