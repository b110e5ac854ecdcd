# The CUDA kernels, or their stand-ins that raise. Sets ZEROOPT_WITH_CUDA, ZEROOPT_CUDA_SOURCES and ZEROOPT_CUDA_ARCHS.
#
# ZEROOPT_CUDA (environment or -D): auto compiles them when there is a CUDA compiler, on demands one, off does without.
# Architectures: CMAKE_CUDA_ARCHITECTURES (-D or environment) or CUDAARCHS in CMake's notation, else TORCH_CUDA_ARCH_LIST,
# else the default.
set(ZEROOPT_WITH_CUDA 0)
set(ZEROOPT_CUDA_ARCHS "")
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
  return()
endif()

# A build directory may be older than the CUDA toolkit: look again when nothing was found before.
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)
  find_program(ZEROOPT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(ZEROOPT_NVCC AND NOT DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER ${ZEROOPT_NVCC})
  endif()
endif()

# "8.0;9.0+PTX" or "8.0 8.6" in torch's notation to "80-real;90" in CMake's.
function(zeroopt_archs_from_torch list result)
  string(REGEX REPLACE "[ ,]+" ";" list "${list}")
  set(archs "")
  foreach(arch IN LISTS list)
    if(NOT arch MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0+PTX, got \"${arch}\"")
    endif()
    if(CMAKE_MATCH_3)
      list(APPEND archs "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    else()
      list(APPEND archs "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real")
    endif()
  endforeach()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

# Machine code for each generation this compiler knows, and PTX of the newest for what comes after it.
function(zeroopt_default_archs result)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  set(archs "")
  foreach(arch 75 80 86 90 100 120)
    if(known MATCHES "compute_${arch}\n")
      list(APPEND archs ${arch})
    endif()
  endforeach()
  list(POP_BACK archs newest)
  list(TRANSFORM archs APPEND "-real")
  set(${result} "${archs};${newest}" PARENT_SCOPE)
endfunction()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(wanted STREQUAL "on")
    message(FATAL_ERROR "ZEROOPT_CUDA=on, but there is no working CUDA compiler: put nvcc on PATH or set CUDACXX")
  endif()
  message(STATUS "No CUDA compiler: CPU kernels only")
  return()
endif()

if(DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(ZEROOPT_CUDA_ARCHS "${CMAKE_CUDA_ARCHITECTURES}")
elseif(DEFINED ENV{CMAKE_CUDA_ARCHITECTURES})
  set(ZEROOPT_CUDA_ARCHS "$ENV{CMAKE_CUDA_ARCHITECTURES}")
elseif(DEFINED ENV{CUDAARCHS})
  set(ZEROOPT_CUDA_ARCHS "$ENV{CUDAARCHS}")
elseif(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
  zeroopt_archs_from_torch("$ENV{TORCH_CUDA_ARCH_LIST}" ZEROOPT_CUDA_ARCHS)
else()
  zeroopt_default_archs(ZEROOPT_CUDA_ARCHS)
endif()

# The compiler is tried out with one architecture, its default; the sources are compiled for all of them.
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)

set(warnings -Wall,-Wextra)
if(ZEROOPT_WERROR)
  string(APPEND warnings ",-Werror")
endif()
add_library(cuda_kernels OBJECT
  csrc/cuda/steps.cu
  csrc/cuda/pack.cu csrc/cuda/pack_segments.cu
  csrc/cuda/reduce.cu
  csrc/cuda/norm.cu
  csrc/cuda/quantize.cu)
set_target_properties(cuda_kernels PROPERTIES CUDA_ARCHITECTURES "${ZEROOPT_CUDA_ARCHS}")
target_include_directories(cuda_kernels PRIVATE csrc)
# -fmad=false: the same roundings as on the CPU.
target_compile_options(cuda_kernels PRIVATE -fmad=false --threads=2 -Xcompiler=${warnings}
  $<$<BOOL:${ZEROOPT_WERROR}>:--Werror=all-warnings>)

set(ZEROOPT_WITH_CUDA 1)
set(ZEROOPT_CUDA_SOURCES $<TARGET_OBJECTS:cuda_kernels>)
message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} kernels for ${ZEROOPT_CUDA_ARCHS}")
