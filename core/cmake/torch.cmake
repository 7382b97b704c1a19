# Imported targets for libtorch. `find_package(Torch)` wants the whole CUDA toolkit, so the targets are made by hand.
# TESSERA_TORCH_DIR names a folder with include/ and lib/, such as the `torch` folder of the PyPI wheel.
set(TESSERA_TORCH_VERSION 2.11.0)
if(NOT TESSERA_TORCH_DIR AND DEFINED ENV{TESSERA_TORCH_DIR})
  set(TESSERA_TORCH_DIR $ENV{TESSERA_TORCH_DIR})
endif()
if(NOT TESSERA_TORCH_DIR)
  set(TESSERA_TORCH_DIR ${CMAKE_SOURCE_DIR}/.deps/python/torch)
endif()
set(TESSERA_TORCH_DIR ${TESSERA_TORCH_DIR} CACHE PATH "folder of libtorch: include/ and lib/")
if(NOT EXISTS ${TESSERA_TORCH_DIR}/lib/libtorch_cpu.so)
  message(FATAL_ERROR "no libtorch at ${TESSERA_TORCH_DIR}: run `./tessera setup`, "
    "or name one with -DTESSERA_TORCH_DIR=/path/to/site-packages/torch (version ${TESSERA_TORCH_VERSION})")
endif()
if(EXISTS ${TESSERA_TORCH_DIR}/version.py)
  file(STRINGS ${TESSERA_TORCH_DIR}/version.py torch_version REGEX "^__version__")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" torch_version "${torch_version}")
  if(NOT torch_version STREQUAL TESSERA_TORCH_VERSION)
    message(FATAL_ERROR "libtorch at ${TESSERA_TORCH_DIR} is ${torch_version}: tessera is built against ${TESSERA_TORCH_VERSION}")
  endif()
endif()

foreach(lib IN ITEMS c10 torch_cpu c10_cuda torch_cuda)
  if(EXISTS ${TESSERA_TORCH_DIR}/lib/lib${lib}.so)
    add_library(torch::${lib} SHARED IMPORTED GLOBAL)
    set_target_properties(torch::${lib} PROPERTIES IMPORTED_LOCATION ${TESSERA_TORCH_DIR}/lib/lib${lib}.so)
  endif()
endforeach()

add_library(torch::torch INTERFACE IMPORTED GLOBAL)
target_include_directories(torch::torch SYSTEM INTERFACE
  ${TESSERA_TORCH_DIR}/include ${TESSERA_TORCH_DIR}/include/torch/csrc/api/include)
# The wheel ships fmt's headers; they are used header-only everywhere so that no second fmt is linked.
target_compile_definitions(torch::torch INTERFACE _GLIBCXX_USE_CXX11_ABI=1 FMT_HEADER_ONLY)
target_link_libraries(torch::torch INTERFACE torch::torch_cpu torch::c10)
target_link_options(torch::torch INTERFACE -Wl,--allow-shlib-undefined)
if(TESSERA_CUDA)
  if(NOT TARGET torch::torch_cuda)
    message(FATAL_ERROR "TESSERA_CUDA needs a CUDA build of libtorch: ${TESSERA_TORCH_DIR} has no libtorch_cuda.so")
  endif()
  # Nothing calls it by name: it registers the CUDA kernels when it is loaded.
  target_link_libraries(torch::torch INTERFACE -Wl,--no-as-needed torch::torch_cuda torch::c10_cuda -Wl,--as-needed)
endif()
set(CMAKE_BUILD_RPATH ${TESSERA_TORCH_DIR}/lib)
