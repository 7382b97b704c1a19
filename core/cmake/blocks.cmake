# tessera_add_block(NAME [SOURCES ...]): a plugin, NAME.so, made of NAME.cpp or of the given sources. The target is block_NAME.
# A plugin links the operators and the core's base, never the runtime; it exports its entry point alone and is never unloaded.
function(tessera_add_block name)
  cmake_parse_arguments(block "" "" "SOURCES" ${ARGN})
  if(block_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "tessera_add_block(${name}): unknown argument ${block_UNPARSED_ARGUMENTS}: write tessera_add_block(NAME [SOURCES FILE...])")
  endif()
  if(NOT block_SOURCES)
    set(block_SOURCES ${name}.cpp)
  endif()
  add_library(block_${name} MODULE ${block_SOURCES})
  target_link_libraries(block_${name} PRIVATE $<TARGET_NAME_IF_EXISTS:tessera_options> tessera::layers tessera::core)
  target_link_options(block_${name} PRIVATE -Wl,-z,defs -Wl,-z,nodelete)
  set_target_properties(block_${name} PROPERTIES PREFIX "" OUTPUT_NAME ${name} CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
endfunction()
