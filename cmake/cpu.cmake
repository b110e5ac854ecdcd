# The CPU kernels: what splits the work over threads, ZEROOPT_CPU_SOURCES, and one object library per instruction set,
# from the same sources. zeroopt_link_cpu_kernels(name) gives a target with the former the latter.
include(CheckCXXCompilerFlag)

set(ZEROOPT_CPU_SOURCES isa openmp pack reduce copy block steps norm exact_sum quantize wire_code)
list(TRANSFORM ZEROOPT_CPU_SOURCES REPLACE "(.+)" "${ZEROOPT_CSRC}/cpu/\\1.cpp")

set(ZEROOPT_LEAF_SOURCES table pack reduce copy formats wire_code norm exact_sum steps)
list(TRANSFORM ZEROOPT_LEAF_SOURCES REPLACE "(.+)" "${ZEROOPT_CSRC}/cpu/leaf/\\1.cpp")

set(ZEROOPT_ISA_LIBRARIES "")
set(ZEROOPT_ISA_DEFINITIONS "") # ZEROOPT_HAS_AVX2 and the like

function(zeroopt_add_isa name)
  add_library(leaf_${name} OBJECT ${ZEROOPT_LEAF_SOURCES})
  zeroopt_target(leaf_${name})
  target_compile_definitions(leaf_${name} PRIVATE ZEROOPT_ISA=${name})
  target_compile_options(leaf_${name} PRIVATE ${ARGN})
  set(ZEROOPT_ISA_LIBRARIES ${ZEROOPT_ISA_LIBRARIES} leaf_${name} PARENT_SCOPE)
  string(TOUPPER ${name} upper)
  set(ZEROOPT_ISA_DEFINITIONS ${ZEROOPT_ISA_DEFINITIONS} ZEROOPT_HAS_${upper} PARENT_SCOPE)
endfunction()

# What every processor of the kind has: SSE2 on x86-64, NEON on 64-bit Arm.
zeroopt_add_isa(generic)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  check_cxx_compiler_flag("-mavx2" CXX_HAS_AVX2)
  if(CXX_HAS_AVX2)
    zeroopt_add_isa(avx2 -mavx2)
  endif()
  set(avx512_flags -mavx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
  list(JOIN avx512_flags " " avx512_flag_string)
  check_cxx_compiler_flag("${avx512_flag_string}" CXX_HAS_AVX512)
  if(CXX_HAS_AVX512)
    zeroopt_add_isa(avx512 ${avx512_flags})
  endif()
endif()

# For vectors of any length, not for one of -msve-vector-bits: one object then serves Graviton3's 32 bytes and A64FX's 64
# as well as what comes, where otherwise there would be one for each, and none for lengths that nobody thought of.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  check_cxx_compiler_flag("-march=armv8.2-a+sve" CXX_HAS_SVE)
  if(CXX_HAS_SVE)
    zeroopt_add_isa(sve -march=armv8.2-a+sve)
  endif()
endif()

function(zeroopt_link_cpu_kernels name)
  target_compile_definitions(${name} PRIVATE ${ZEROOPT_ISA_DEFINITIONS})
  target_link_libraries(${name} PRIVATE ${ZEROOPT_ISA_LIBRARIES} ${CMAKE_DL_LIBS})
endfunction()
