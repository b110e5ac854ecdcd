# pybind11 as torch's wheels carry it, headers alone: for machines without a package index, which `python -m bench.gpu` builds on.
# ZEROOPT_TORCH_INCLUDE: torch's folder of headers.
set(pybind11_FOUND TRUE)

function(pybind11_add_module name)
  cmake_parse_arguments(module "MODULE;NO_EXTRAS" "" "" ${ARGN})
  Python_add_library(${name} MODULE WITH_SOABI ${module_UNPARSED_ARGUMENTS})
  target_include_directories(${name} SYSTEM PRIVATE ${ZEROOPT_TORCH_INCLUDE})
endfunction()
