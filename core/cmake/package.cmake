# The package: `cmake --install BUILD --prefix DIR`, and find_package(tessera) from the build folder as from an installation.
# bin/tessera starts lib/tessera/bin/tessera, beside which lie the plugins, as in a build folder.
include(CMakePackageConfigHelpers)
string(REGEX MATCH "^[0-9]+" tessera_compiler_major "${CMAKE_CXX_COMPILER_VERSION}")
configure_file(${CMAKE_SOURCE_DIR}/core/cmake/tesseraConfig.cmake.in ${CMAKE_BINARY_DIR}/tesseraConfig.cmake @ONLY)
write_basic_package_version_file(${CMAKE_BINARY_DIR}/tesseraConfigVersion.cmake COMPATIBILITY SameMinorVersion)
configure_file(${CMAKE_SOURCE_DIR}/core/cmake/torch.cmake ${CMAKE_BINARY_DIR}/tesseraTorch.cmake COPYONLY)
configure_file(${CMAKE_SOURCE_DIR}/core/cmake/blocks.cmake ${CMAKE_BINARY_DIR}/tesseraBlocks.cmake COPYONLY)
configure_file(${CMAKE_SOURCE_DIR}/core/cmake/start.sh.in ${CMAKE_BINARY_DIR}/start.sh @ONLY)

set(tessera_rpath "${TESSERA_TORCH_DIR}/lib")
set_target_properties(tessera_core tessera_layers PROPERTIES INSTALL_RPATH "$ORIGIN;${tessera_rpath}")
set_target_properties(tessera PROPERTIES INSTALL_RPATH "$ORIGIN/../..;${tessera_rpath}")
set_target_properties(tessera_core PROPERTIES EXPORT_NAME core)
set_target_properties(tessera_layers PROPERTIES EXPORT_NAME layers)

install(TARGETS tessera_core tessera_layers EXPORT tesseraTargets LIBRARY DESTINATION lib)
install(TARGETS tessera RUNTIME DESTINATION lib/tessera/bin)
install(PROGRAMS ${CMAKE_BINARY_DIR}/start.sh DESTINATION bin RENAME tessera)
foreach(block IN LISTS tessera_blocks)
  set_target_properties(block_${block} PROPERTIES INSTALL_RPATH "$ORIGIN/../..;${tessera_rpath}")
  install(TARGETS block_${block} LIBRARY DESTINATION lib/tessera/plugins)
endforeach()

install(DIRECTORY core/include/tessera DESTINATION include)
# Operators that take a block's tensors; what they share among themselves stays here.
install(DIRECTORY layers DESTINATION include FILES_MATCHING PATTERN "*.hpp"
  PATTERN "*_cpu.hpp" EXCLUDE PATTERN "few_rows.hpp" EXCLUDE PATTERN "matmul.hpp" EXCLUDE PATTERN "tile_gemm.hpp" EXCLUDE PATTERN "vector_math.hpp" EXCLUDE)
install(DIRECTORY configs DESTINATION share/tessera)
install(DIRECTORY docs DESTINATION share/doc/tessera)
install(FILES README.md LICENSE DESTINATION share/doc/tessera)

install(EXPORT tesseraTargets NAMESPACE tessera:: DESTINATION lib/cmake/tessera)
export(EXPORT tesseraTargets NAMESPACE tessera:: FILE ${CMAKE_BINARY_DIR}/tesseraTargets.cmake)
install(FILES ${CMAKE_BINARY_DIR}/tesseraConfig.cmake ${CMAKE_BINARY_DIR}/tesseraConfigVersion.cmake
  ${CMAKE_BINARY_DIR}/tesseraTorch.cmake ${CMAKE_BINARY_DIR}/tesseraBlocks.cmake DESTINATION lib/cmake/tessera)
