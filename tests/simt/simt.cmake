# SPDX-License-Identifier: Apache-2.0
# The CUDA kernels on the CPU: the same .cu text compiled by the host's C++ compiler with the shim in front, as two shared
# libraries (plain, and check: every access goes through a hook), and each tests/simt/test_*.c[pp] linked to both.
# Shared libraries, because the shim poisons all thread_local memory of the library that holds the kernels.
include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER OR TD_SANITIZE STREQUAL "thread" OR NOT CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  message(STATUS "CUDA kernels on the CPU (tests/simt): left out, no C++ compiler or not for this build")
  return()
endif()
enable_language(CXX)
set(CMAKE_CXX_STANDARD 17)
if(TD_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${TD_CCACHE})
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -g")
file(GLOB simt_cu CONFIGURE_DEPENDS kernels/*_cuda*.cu tests/simt/*.cu)
set_source_files_properties(${simt_cu} PROPERTIES LANGUAGE CXX)
set(simt_fma)
if(EXISTS /proc/cpuinfo)
  file(STRINGS /proc/cpuinfo simt_cpu REGEX "^flags.* avx2 .*" LIMIT_COUNT 1)
  if(simt_cpu MATCHES " fma ")
    set(simt_fma -mavx2 -mfma) # fmaf() as an instruction; -ffp-contract=off stays, so bits are the same either way
  endif()
endif()

function(td_simt name)
  add_library(${name}_rt OBJECT tests/simt/simt_rt.cpp tests/simt/simt_sm90a.cpp)
  add_library(${name} SHARED ${simt_cu} $<TARGET_OBJECTS:${name}_rt>)
  foreach(t ${name} ${name}_rt)
    target_include_directories(${t} PRIVATE ${CMAKE_SOURCE_DIR})
    target_compile_options(${t} PRIVATE -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-psabi -fstack-clash-protection ${simt_fma}
      -ftls-model=initial-exec)
  endforeach()
  target_compile_options(${name} PRIVATE -x c++ -include ${CMAKE_SOURCE_DIR}/tests/simt/simt.h)
  target_link_libraries(${name} PRIVATE ${CMAKE_DL_LIBS})
endfunction()
td_simt(td_simt_kernels)
set(simt_modes "simt:td_simt_kernels")
if(NOT TD_SANITIZE)
  td_simt(td_simt_check)
  target_compile_definitions(td_simt_check PRIVATE SIMT_CHECK)
  target_compile_definitions(td_simt_check_rt PRIVATE SIMT_CHECK)
  target_compile_options(td_simt_check PRIVATE -O1 -fsanitize=thread)
  list(APPEND simt_modes "simt_check:td_simt_check")
endif()

file(GLOB simt_tests CONFIGURE_DEPENDS tests/simt/test_*.c tests/simt/test_*.cpp)
list(APPEND simt_tests tests/gpu/test_hopper.c) # small cases; `all`: as on a device
file(GLOB simt_support CONFIGURE_DEPENDS tests/simt/support_*.c)
# Tests of the CPU families that take the CUDA table as one more family (support_staged.h).
set(simt_shared tests/kernels/test_errors.c tests/kernels/test_confined.c tests/kernels/test_rows.c tests/kernels/test_sample.c
  tests/kernels/test_moe.c tests/kernels/test_gemm.c tests/kernels/test_attn.c)
set(simt_plain tests/kernels/test_gemm.c tests/kernels/test_attn.c) # each access is looked at in test_gemm_cuda.c, test_attn_cuda.c
if(NOT TARGET td_ship)
  list(FILTER simt_tests EXCLUDE REGEX "test_ship_cuda")
endif()
foreach(t ${simt_tests} ${simt_shared})
  get_filename_component(n ${t} NAME_WE)
  foreach(m ${simt_modes})
    string(REGEX REPLACE ":.*" "" area ${m})
    string(REGEX REPLACE ".*:" "" lib ${m})
    if(t IN_LIST simt_plain AND NOT area STREQUAL "simt")
      continue()
    endif()
    add_executable(${area}_${n} ${t} ${simt_support})
    target_compile_options(${area}_${n} PRIVATE -Wall -Wextra)
    target_include_directories(${area}_${n} PRIVATE ${CMAKE_SOURCE_DIR})
    if(n STREQUAL "test_stage_cuda") # of the cluster's library, which needs not be there
      target_sources(${area}_${n} PRIVATE worker/ship/stage.c worker/ship/codec.c worker/ship/token_map.c)
    endif()
    if(n STREQUAL "test_ship_cuda")
      target_sources(${area}_${n} PRIVATE tests/ship/support_grid.c tests/ship/support_kv.c)
      target_link_libraries(${area}_${n} PRIVATE ${lib} td_ship) # the shim's td_dev_open_cuda wins
    endif()
    if(t IN_LIST simt_shared)
      target_compile_definitions(${area}_${n} PRIVATE td_ops_family=td_staged_family TEST_X86_LAW=0 TEST_PARTS=0 TEST_DRAWS=1000 TEST_LARGE_V=8501 TEST_PARTS_V=600)
    endif()
    target_link_libraries(${area}_${n} PRIVATE ${lib} td_engine td_kernels) # in this order: the library's td_dev_open_cuda wins
    set_target_properties(${area}_${n} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests LINKER_LANGUAGE CXX)
    add_test(NAME ${area}/${n} COMMAND ${area}_${n} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
    set_tests_properties(${area}/${n} PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 1200)
    if(area STREQUAL "simt") # a host access to device memory ends the test
      set_tests_properties(${area}/${n} PROPERTIES ENVIRONMENT SIMT_HIDE=1)
    endif()
  endforeach()
  # The other skewed schedule: warps and lanes descending. Not for the long ones, whose kernels the others run as well.
  if(NOT n MATCHES "forward|sample|moe|engine|stage|choose|boot|ranks" AND NOT t IN_LIST simt_plain)
    add_test(NAME simt_reverse/${n} COMMAND simt_${n} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
    set_tests_properties(simt_reverse/${n} PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 1200 ENVIRONMENT SIMT_ORDER=1)
  endif()
endforeach()

# Every .cu by nvcc for sm_90a, figures against the limits beside the kernels; cached by content in the build folder.
if(TD_NVCC AND NOT TD_CUDA STREQUAL "OFF")
  add_test(NAME simt/test_compile COMMAND python3 tests/simt/test_compile.py --nvcc ${TD_NVCC}
    --cache ${CMAKE_BINARY_DIR}/nvcc-cache WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(simt/test_compile PROPERTIES TIMEOUT 1200 PROCESSORS 2 COST 200)
endif()

# Programs on the emulated device: tests/gpu/run --shim runs its whole logic on them.
add_executable(simt_tandem deploy/cli/main.c deploy/cli/bench_engine.c deploy/cli/bench_kernels.c deploy/cli/bench_ranks.c deploy/cli/logits.c
  deploy/cli/nocluster.c)
add_executable(simt_bench_cuda tests/gpu/bench_cuda.c tests/simt/ceiling_none.c)
add_executable(simt_bench_step tests/gpu/bench_step.c)
target_compile_definitions(simt_bench_cuda PRIVATE BENCH_TINY)
target_compile_definitions(simt_bench_step PRIVATE BENCH_TINY)
set(simt_programs simt_tandem simt_bench_cuda simt_bench_step)
if(TARGET td_ship)
  add_executable(simt_tandem_worker worker/main.c)
  list(APPEND simt_programs simt_tandem_worker)
endif()
foreach(t ${simt_programs})
  target_include_directories(${t} PRIVATE ${CMAKE_SOURCE_DIR})
  # Kept although main.c asks for none of its names: the static libraries behind it do.
  target_link_libraries(${t} PRIVATE -Wl,--push-state,--no-as-needed td_simt_kernels -Wl,--pop-state)
  if(t STREQUAL "simt_tandem_worker")
    target_link_libraries(${t} PRIVATE td_ship)
  endif()
  target_link_libraries(${t} PRIVATE td_engine td_kernels)
  set_target_properties(${t} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/simt LINKER_LANGUAGE CXX)
endforeach()
add_test(NAME simt/test_gpu_run COMMAND python3 tests/simt/test_gpu_run.py WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
set_tests_properties(simt/test_gpu_run PROPERTIES TIMEOUT 300 ENVIRONMENT "TANDEM_BUILD=${CMAKE_BINARY_DIR}")
