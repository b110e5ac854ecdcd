set(ZEROOPT_OLDEST_CUDA 11.8) # of cudaLaunchKernelEx

# Sets result to why the compiler that enable_language(CUDA) would take cannot be used, or to nothing. A project of its own
# finds out, for where enable_language fails it ends the project that asked.
function(zeroopt_try_cuda result)
  set(compiler "${CMAKE_CUDA_COMPILER}")
  if(NOT compiler)
    set(compiler "$ENV{CUDACXX}")
  endif()
  if(compiler STREQUAL "")
    set(${result} "there is no nvcc: put it on PATH, or set CUDA_HOME or CUDACXX" PARENT_SCOPE)
    return()
  endif()
  set(attempt "${compiler} ${CMAKE_CUDA_HOST_COMPILER} ${CMAKE_CUDA_FLAGS}")
  set(${result} "" PARENT_SCOPE)
  if(attempt STREQUAL "${ZEROOPT_CUDA_WORKS}")
    return()
  endif()

  zeroopt_command_of("${compiler}" command)
  execute_process(COMMAND ${command} --version OUTPUT_VARIABLE told ERROR_QUIET)
  if(told MATCHES "release ([0-9.]+)" AND CMAKE_MATCH_1 VERSION_LESS ZEROOPT_OLDEST_CUDA)
    set(${result} "${compiler} is of CUDA ${CMAKE_MATCH_1}, and kernels need ${ZEROOPT_OLDEST_CUDA} or newer" PARENT_SCOPE)
    return()
  endif()

  set(folder ${CMAKE_CURRENT_BINARY_DIR}/try_cuda)
  file(REMOVE_RECURSE ${folder})
  file(WRITE ${folder}/CMakeLists.txt "cmake_minimum_required(VERSION 3.24)\nproject(try_cuda LANGUAGES CUDA)\n")
  set(options -DCMAKE_CUDA_ARCHITECTURES=OFF)
  foreach(name CMAKE_CUDA_COMPILER CMAKE_CUDA_HOST_COMPILER CMAKE_CUDA_FLAGS CMAKE_MAKE_PROGRAM CMAKE_TOOLCHAIN_FILE)
    if(${name})
      list(APPEND options "-D${name}=${${name}}")
    endif()
  endforeach()
  message(STATUS "Trying the CUDA compiler ${compiler}")
  execute_process(
    COMMAND ${CMAKE_COMMAND} -S ${folder} -B ${folder}/build -G ${CMAKE_GENERATOR} ${options}
    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT failed)
    set(ZEROOPT_CUDA_WORKS "${attempt}" CACHE INTERNAL "the CUDA compiler that was tried and works")
    return()
  endif()
  file(WRITE ${folder}/output.txt "${output}")
  zeroopt_words_of("${compiler}" ${folder} words)
  set(${result} "${compiler} does not work: ${words} (what CMake says is in ${folder}/output.txt)" PARENT_SCOPE)
endfunction()

# A compiler as the beginning of a command, for it may have options behind it.
function(zeroopt_command_of compiler result)
  set(command "${compiler}")
  if(NOT EXISTS "${compiler}") # else it is a path, which may have spaces
    separate_arguments(command UNIX_COMMAND "${compiler}")
  endif()
  set(${result} "${command}" PARENT_SCOPE)
endfunction()

# What a compiler says that has been given a file without anything in it: its first line about an error.
function(zeroopt_words_of compiler folder result)
  file(WRITE ${folder}/nothing.cu "")
  zeroopt_command_of("${compiler}" command)
  if(CMAKE_CUDA_HOST_COMPILER)
    list(APPEND command -ccbin ${CMAKE_CUDA_HOST_COMPILER})
  endif()
  separate_arguments(flags UNIX_COMMAND "${CMAKE_CUDA_FLAGS}")
  execute_process(
    COMMAND ${command} ${flags} -c nothing.cu -o nothing.o WORKING_DIRECTORY ${folder}
    RESULT_VARIABLE words OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(output MATCHES "[^\n]*([Ee]rror|[Ff]atal)[^\n]*")
    set(words "${CMAKE_MATCH_0}")
  elseif(words EQUAL 0)
    set(words "it compiles, but not what CMake tries")
  elseif(words MATCHES "^[0-9]+$")
    set(words "it ends with code ${words}")
  endif()
  string(STRIP "${words}" words)
  set(${result} "${words}" PARENT_SCOPE)
endfunction()
