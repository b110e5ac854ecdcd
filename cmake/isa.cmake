# One object library per instruction set, from the same sources. Sets ZEROOPT_ISAS,
# ZEROOPT_ISA_LIBRARIES and ZEROOPT_ISA_DEFINITIONS (ZEROOPT_HAS_AVX2 and the like).
include(CheckCXXCompilerFlag)

set(ZEROOPT_ISAS "")
set(ZEROOPT_ISA_LIBRARIES "")
set(ZEROOPT_ISA_DEFINITIONS "")

function(zeroopt_add_isa name)
  add_library(leaf_${name} OBJECT
    csrc/cpu/leaf/table.cpp
    csrc/cpu/leaf/pack.cpp
    csrc/cpu/leaf/reduce.cpp
    csrc/cpu/leaf/copy.cpp
    csrc/cpu/leaf/formats.cpp
    csrc/cpu/leaf/wire_code.cpp
    csrc/cpu/leaf/norm.cpp
    csrc/cpu/leaf/exact_sum.cpp
    csrc/cpu/leaf/steps.cpp)
  zeroopt_target(leaf_${name})
  target_compile_definitions(leaf_${name} PRIVATE ZEROOPT_ISA=${name})
  target_compile_options(leaf_${name} PRIVATE ${ARGN})
  set(ZEROOPT_ISAS ${ZEROOPT_ISAS} ${name} PARENT_SCOPE)
  set(ZEROOPT_ISA_LIBRARIES ${ZEROOPT_ISA_LIBRARIES} leaf_${name} PARENT_SCOPE)
  string(TOUPPER ${name} upper)
  set(ZEROOPT_ISA_DEFINITIONS ${ZEROOPT_ISA_DEFINITIONS} ZEROOPT_HAS_${upper} PARENT_SCOPE)
endfunction()

zeroopt_add_isa(generic)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
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
