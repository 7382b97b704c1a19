# tessera_add_block(NAME [SOURCES ...]): a plugin of one block type in plugins/NAME.cpp.
# A plugin links the operators and the core's base, never the runtime; it exports its entry point alone and is never unloaded.
function(tessera_add_block name)
  cmake_parse_arguments(block "" "" "SOURCES" ${ARGN})
  if(NOT block_SOURCES)
    set(block_SOURCES ${name}.cpp)
  endif()
  add_library(block_${name} MODULE ${block_SOURCES})
  target_link_libraries(block_${name} PRIVATE tessera_options tessera::layers tessera::core)
  target_link_options(block_${name} PRIVATE -Wl,-z,defs -Wl,-z,nodelete)
  set_target_properties(block_${name} PROPERTIES PREFIX "" OUTPUT_NAME ${name}
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/plugins BUILD_RPATH "${CMAKE_BINARY_DIR}/lib;${TESSERA_TORCH_DIR}/lib")
endfunction()
