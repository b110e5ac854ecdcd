# The target `kernels`: what of this code needs no Python, as a static library. It is compiled from these sources, or taken
# from a build of them that the folder ZEROOPT_KERNELS holds, for modules of several Pythons (`make wheels`).
set(ZEROOPT_KERNELS "" CACHE PATH "A folder in which the target `kernels` was built from these very sources")

if(ZEROOPT_KERNELS)
  if(NOT EXISTS "${ZEROOPT_KERNELS}/kernels.cmake")
    message(FATAL_ERROR "ZEROOPT_KERNELS=${ZEROOPT_KERNELS}: there is no kernels.cmake. Build it first: "
      "cmake -S . -B FOLDER -DZEROOPT_MODULE=OFF && cmake --build FOLDER")
  endif()
  include("${ZEROOPT_KERNELS}/kernels.cmake")
  return()
endif()

include(cmake/cpu.cmake)
include(cmake/cuda.cmake)

add_library(kernels STATIC
  csrc/layouts.cpp
  csrc/partition.cpp
  csrc/fill_buckets.cpp
  csrc/owners.cpp
  csrc/whole_params.cpp
  csrc/cpu/shm_board.cpp
  csrc/cpu/shm_mapping.cpp
  ${ZEROOPT_CPU_SOURCES}
  ${ZEROOPT_CUDA_SOURCES})
zeroopt_target(kernels)
zeroopt_link_cpu_kernels(kernels)

set(ZEROOPT_LINK_LIBRARIES ${CMAKE_DL_LIBS})
if(ZEROOPT_WITH_CUDA)
  find_library(ZEROOPT_CUDART cudart_static HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} REQUIRED NO_DEFAULT_PATH)
  list(APPEND ZEROOPT_LINK_LIBRARIES ${ZEROOPT_CUDART} rt pthread)
endif()
target_link_libraries(kernels INTERFACE ${ZEROOPT_LINK_LIBRARIES})
configure_file(cmake/kernels.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/kernels.cmake @ONLY)
