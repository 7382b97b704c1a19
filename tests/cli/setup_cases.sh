#!/usr/bin/env bash
# setup_cases.sh TESSERA CASE: one case of the `tessera` script against tools that only pretend (cmake, pip, apt-get, ...), in a folder
# whose name has a space. Exits 0 where the case holds; otherwise says what was expected.
set -u
script=$1
box=$(mktemp -d)
trap 'rm -rf "$box"' EXIT
here="$box/a folder" log="$box/calls" bin="$box/bin"
export BOX=$box
unset TESSERA_TORCH_DIR CMAKE_PREFIX_PATH CMAKE_BUILD_PARALLEL_LEVEL CXX GTEST_FILTER TESSERA_TEST_ALL
export TESSERA_DEVICE=cpu

tool() { { echo '#!/bin/bash'; echo "echo \"$1 \$*\" >>\"\$BOX/calls\""; cat; } >"$bin/$1"; chmod +x "$bin/$1"; }

mkdir -p "$bin" "$here"/{core,layers,plugins}
touch "$here"/{CMakeLists.txt,CMakePresets.json,core/a.cpp,plugins/b.cpp} "$log"
cp "$script" "$here/tessera"
printf '%s\n' libboost-dev libboost-filesystem-dev libcli11-dev libtomlplusplus-dev nlohmann-json3-dev libgtest-dev libbenchmark-dev libjs-chart.js >"$box/installed"
tool ninja <<<''
tool ccache <<<''
tool 'c++' <<<'[ ! -e "$BOX/old_compiler" ]'
tool id <<<'cat "$BOX/uid"'
tool sudo <<<'[ -e "$BOX/sudo_works" ] || exit 1; shift; exec "$@"'
tool dpkg <<<''
tool dpkg-query <<<'sed "s/^/installed /" "$BOX/installed"'
tool apt-get <<<'case "$*" in *download-only*) ;; *" install "*) printf "%s\n" ${*#* install } >>"$BOX/installed" ;; esac'
tool python3 <<'TOOL'
[ "$*" != "-m pip --version" ] || exit 0
while [ "$1" != --target ]; do shift; done
mkdir -p "$2/torch/lib" && echo part >"$2/torch/lib/libtorch_c10.so"
[ ! -e "$BOX/pip_hangs" ] || { touch "$BOX/pip_started"; sleep 60; }
[ ! -e "$BOX/pip_fails" ] || { echo "no route to the index"; exit 1; }
touch "$2/torch/lib/libtorch_cpu.so"
TOOL
tool cmake <<'TOOL'
if [ "$1" = --preset ]; then mkdir -p "build/$2"; touch "build/$2/build.ninja"; echo "CMAKE_HOME_DIRECTORY:INTERNAL=$PWD" >"build/$2/CMakeCache.txt"; exit; fi
[ ! -e "$BOX/build_fails" ] || { sleep 1; echo 'FAILED: a.o'; echo '/usr/bin/c++ -O2 -o a.o -c a.cpp'; echo "a.cpp:1:1: error: expected ';'"; exit 1; }
sleep 0.2
mkdir -p "build/$3/bin"; printf '#!/bin/bash\necho "ran $*"; exit ${EXIT:-0}\n' >"build/$3/bin/tessera"; chmod +x "build/$3/bin/tessera"
TOOL
tool ctest <<<'echo "filter=${GTEST_FILTER:-} all=${TESSERA_TEST_ALL:-}" >>"$BOX/calls"; cat "$BOX/ctest_output"'
echo 1000 >"$box/uid"
export PATH="$bin:/usr/bin:/bin"

run() { "$here/tessera" "$@" >"$box/out" 2>"$box/err"; status=$?; }
fail() { echo "expected $1"; echo "status $status"; for f in out err calls; do echo "-- $f"; cat "$box/$f"; done; exit 1; }
exits() { [ "$status" = "$1" ] || fail "exit code $1"; }
prints() { [ "$(cat "$box/out")" = "$1" ] || fail "on stdout: $1"; }
says() { grep -qF -- "$1" "$box/err" || fail "on stderr: $1"; }
calls() { [ "$(grep -cE -- "$2" "$log")" = "$1" ] || fail "$1 calls of $2"; }
older() { touch -d '1 hour ago' "$here"/{core,layers,plugins,core/a.cpp,plugins/b.cpp,CMakeLists.txt,CMakePresets.json,tessera}; }

becomes_the_command() {
  EXIT=7 run plan --json 'a b'
  exits 7; prints 'ran plan --json a b'
  calls 1 '^python3 .*--no-deps torch==2.11.0'; calls 1 '^cmake --preset release'; calls 1 '^cmake --build'; calls 0 '^apt-get'
}
does_nothing_twice() {
  run x; : >"$log"; run y
  exits 0; prints 'ran y'; [ ! -s "$log" ] || fail "no call at all"; [ ! -s "$box/err" ] || fail "silence"
}
builds_what_changed() {
  local file
  for file in core/a.cpp plugins/b.cpp plugins/new.cpp CMakeLists.txt; do
    older; run x; : >"$log"; touch "$here/$file"; run y
    exits 0; calls 1 '^cmake --build'; calls 0 '^cmake --preset'; calls 0 '^python3'
  done
  older; run x; : >"$log"; rm "$here/plugins/new.cpp"; run y; calls 1 '^cmake --build'
}
many_at_once_build_once() {
  local i pids=() codes=''
  for i in 1 2 3 4 5 6 7 8; do "$here/tessera" "$i" >>"$box/out" 2>>"$box/err" & pids+=($!); done
  for i in "${pids[@]}"; do wait "$i"; codes+=$?; done
  status=$codes; exits 00000000; calls 1 '^cmake --build'; calls 1 '^python3 .*install'
  [ "$(grep -c '^ran [1-8]$' "$box/out")" = 8 ] || fail "eight commands"
}
one_failure_serves_all_that_wait() {
  local i pids=() codes=''
  run x; touch "$box/build_fails" "$here/core/a.cpp"; : >"$log"
  for i in 1 2 3 4; do "$here/tessera" "$i" >>"$box/out" 2>>"$box/err" & pids+=($!); done
  for i in "${pids[@]}"; do wait "$i"; codes+=$?; done
  status=$codes; exits 4444; [ "$(grep -c "a.cpp:1:1: error" "$box/err")" = 4 ] || fail "four messages"
  calls 1 '^cmake --build'
  run x; exits 4; calls 2 '^cmake --build'  # a later run tries again
}
without_rights_says_what_to_install() {
  sed -i '/gtest/d; /boost-dev/d' "$box/installed"; run x
  exits 4; prints ''; says 'neither root nor sudo without a password to install them: libboost-dev libgtest-dev'
  says 'help: sudo apt-get install --no-install-recommends libboost-dev libgtest-dev'; calls 0 '^apt-get'
}
installs_as_root_or_with_sudo() {
  sed -i '/gtest/d' "$box/installed"; touch "$box/sudo_works"; run x
  exits 0; calls 2 '^sudo .*apt-get .* install libgtest-dev$'
  sed -i '/gtest/d' "$box/installed"; rm "$box/sudo_works"; echo 0 >"$box/uid"; : >"$log"; touch "$here/core/a.cpp"; run x
  exits 0; calls 2 '^apt-get .* install libgtest-dev$'; calls 0 '^sudo'
}
failed_fetch_leaves_nothing() {
  touch "$box/pip_fails"; run x
  exits 4; prints ''; says 'error: setup: pip could not fetch libtorch'; says '  no route to the index'; says 'TESSERA_TORCH_DIR='
  [ ! -e "$here/.deps/python" ] || fail "no half set-up"
  rm "$box/pip_fails"; run x; exits 0; prints 'ran x'
}
interrupted_fetch_is_continued() {
  local pid
  touch "$box/pip_hangs"
  "$here/tessera" x >"$box/out" 2>"$box/err" & pid=$!
  until [ -e "$box/pip_started" ]; do sleep 0.05; done
  kill -TERM $pid; wait $pid; status=$?
  exits 143; says 'stopped; the next run continues'; [ ! -e "$here/.deps/python" ] || fail "no half set-up"
  rm "$box/pip_hangs"; run x; exits 0; prints 'ran x'
}
compile_error_is_shown() {
  run x; touch "$box/build_fails" "$here/core/a.cpp"; run x
  exits 4; prints ''; says "  a.cpp:1:1: error: expected ';'"
  ! grep -q -- '-O2' "$box/err" || fail "the command line left out"
  rm "$box/build_fails"; run x; exits 0; prints 'ran x'
}
old_compiler_is_refused() { touch "$box/old_compiler"; run x; exits 4; says "error: build: the compiler must know C++20, got 'c++'"; }
named_torch_is_checked() {
  local torch="$box/site packages/torch"
  TESSERA_TORCH_DIR=$box/nowhere run x; exits 2; says "TESSERA_TORCH_DIR: must hold lib/libtorch_cpu.so and include/ATen/core/Tensor.h, got '$box/nowhere'"
  mkdir -p "$torch"/{lib,include/ATen/core}; touch "$torch/lib/libtorch_cpu.so" "$torch/include/ATen/core/Tensor.h"
  echo "__version__ = '2.10.1+cpu'" >"$torch/version.py"
  TESSERA_TORCH_DIR=$torch run x; exits 2; says "must be libtorch 2.11.0, got '2.10.1' in '$torch'"
  TESSERA_TORCH_DIR=$box/site\ packages run x; exits 2; says "help: TESSERA_TORCH_DIR=$torch"
  echo "__version__ = '2.11.0+cpu'" >"$torch/version.py"
  TESSERA_TORCH_DIR=$torch run x; exits 0; calls 0 '^python3'; calls 1 "^cmake --preset release -DTESSERA_TORCH_DIR=$torch"
  : >"$log"; run x; exits 0; [ ! -s "$log" ] || fail "the named folder remembered"
  TESSERA_TORCH_DIR='' run x; exits 0; calls 1 '^python3 .*install'
}
device_is_checked() { TESSERA_DEVICE=gpu run x; exits 2; says "error: TESSERA_DEVICE: must be cpu, cuda or auto, got 'gpu'"; }
cuda_fetches_dependencies() {
  TESSERA_DEVICE=cuda run x; exits 0; calls 1 '^python3 .* torch==2.11.0$'; calls 0 'no-deps'
  : >"$log"; run x; exits 0; calls 0 '^python3 .*install'  # serves the CPU too
}
moved_folder_is_configured_afresh() {
  run x; mv "$here" "$box/b"; here=$box/b; : >"$log"; run x
  exits 0; calls 1 '^cmake --preset release --fresh'; calls 0 '^python3'
}
test_of_a_plugin_builds_its_checks() {
  run test --plugin 'my blocks/x.so' Causal
  exits 0; prints 'ran test --plugin my blocks/x.so Causal'; calls 1 '^cmake --build .* tessera_conformance$'; calls 0 'tests/all'; calls 0 '^ctest'
}
test_counts_cases() {
  cat >"$box/ctest_output" <<'OUT'
test 1
    Start 1: core
1: Test command: "test_core"
1: [==========] Running 4 tests from 1 test suite.
1: [ RUN      ] A.good
1: [       OK ] A.good (0 ms)
1: [ RUN      ] A.bad
1: a_test.cpp:3: Failure
1: [  FAILED  ] A.bad, where GetParam() = 3 (1 ms)
1: [ RUN      ] A.skip
1: [  SKIPPED ] A.skip (0 ms)
1: [ RUN      ] A.crash
1/3 Test #1: core .............................***Exception: SegFault  0.50 sec
test 2
    Start 2: layers
2: [==========] Running 1 test from 1 test suite.
2: [ RUN      ] B.good
2: [       OK ] B.good (0 ms)
2: [  PASSED  ] 1 test.
2/3 Test #2: layers ...........................   Passed    0.01 sec
test 3
    Start 3: script
3/3 Test #3: script ...........................   Passed    0.01 sec
OUT
  run test; exits 1; calls 1 '^filter= all=$'; calls 1 '^cmake --build .*--target tessera plugins/all tests/all$'
  [ "$(tail -n 1 "$box/out")" = '3 passed, 2 failed, 1 skipped' ] || fail 'the sum: 3 passed, 2 failed, 1 skipped'
  grep -q 'a_test.cpp:3: Failure' "$box/out" || fail 'the failure'
  grep -q 'CRASHED.*A.crash' "$box/out" || fail 'the crash'
  sed -i '/^1/d' "$box/ctest_output"; run test Some --all; exits 0; calls 1 '^filter=\*Some\* all=1$'
  [ "$(tail -n 1 "$box/out")" = '2 passed, 0 failed' ] || fail 'the sum: 2 passed, 0 failed'
}
test_without_a_match() {
  echo '1: [==========] Running 0 tests from 0 test suites.
1/1 Test #1: core ...   Passed    0.01 sec' >"$box/ctest_output"
  run test nothing; exits 2; says "error: test: no test matches '*nothing*'"
  run test --wrong; exits 2; says "error: test: unknown option '--wrong'"
}

status=0
: >"$box/out"; : >"$box/err"
"$2"
