# Debian's packages. nlohmann-json, toml++, CLI11 and Boost.DLL are header-only; Boost.DLL needs Boost.Filesystem.
find_package(Threads REQUIRED)
find_package(Boost REQUIRED COMPONENTS filesystem)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
find_path(TESSERA_TOMLPP_INCLUDE toml++/toml.h REQUIRED)
# Chart.js 3.9, which reports carry within them.
find_file(TESSERA_CHART_JS chart.min.js PATHS ${CMAKE_PREFIX_PATH} /usr /usr/local PATH_SUFFIXES share/javascript/chart.js REQUIRED)
if(TESSERA_TESTS)
  find_package(GTest REQUIRED)
endif()
if(TESSERA_BENCHMARKS)
  find_package(benchmark REQUIRED)
endif()

# What every target of the project is compiled with.
add_library(tessera_options INTERFACE)
target_compile_options(tessera_options INTERFACE -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers
  $<$<CONFIG:RelWithDebInfo>:-g1>)
