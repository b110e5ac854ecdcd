# How the code of zeroopt is compiled: zeroopt_target(name). Sets ZEROOPT_CXX_FLAGS.
option(ZEROOPT_WERROR "Turn warnings in this code into errors" OFF)
set(ZEROOPT_SANITIZE "" CACHE STRING "What to look for while this code runs: \"address,undefined\", or \"thread\"")

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)

# A result must not depend on the instruction set or on what a compiler cares to fuse: no contraction, no fast-math.
# The other two only drop errno and floating-point traps, which keep loops with sqrt or a select from being vectorised.
set(ZEROOPT_CXX_FLAGS "")
set(ZEROOPT_WARNINGS "")
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set(ZEROOPT_CXX_FLAGS -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math)
  set(ZEROOPT_WARNINGS -Wall -Wextra)
  if(ZEROOPT_WERROR)
    list(APPEND ZEROOPT_WARNINGS -Werror)
  endif()
endif()

if(ZEROOPT_SANITIZE)
  add_link_options(-fsanitize=${ZEROOPT_SANITIZE})
  list(APPEND ZEROOPT_CXX_FLAGS -O1 -g -fsanitize=${ZEROOPT_SANITIZE} -fno-sanitize-recover=all)
endif()

set(ZEROOPT_CSRC ${CMAKE_CURRENT_LIST_DIR}/../csrc)

# The code of zeroopt: its flags and its warnings.
function(zeroopt_target name)
  target_include_directories(${name} PRIVATE ${ZEROOPT_CSRC})
  target_compile_options(${name} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${ZEROOPT_CXX_FLAGS};${ZEROOPT_WARNINGS}>")
endfunction()
