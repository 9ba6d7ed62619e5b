# SPDX-License-Identifier: Apache-2.0
# The amx family on emulated tiles: objects that stand for kernels/amx.c and kernels/*_amx.c, in front of the libraries.
if(NOT CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  return()
endif()
add_library(td_amx_emulated OBJECT tests/amx/emulated.c tests/amx/gemm_emulated.c
            tests/amx/attn_emulated.c)
target_include_directories(td_amx_emulated PRIVATE ${CMAKE_SOURCE_DIR})
target_compile_options(td_amx_emulated PRIVATE ${TD_WARN} -O3)
set_source_files_properties(tests/amx/gemm_emulated.c tests/amx/attn_emulated.c PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c;-mbmi2")

# td_amx_test(name source library [definitions]): a program with the family, whatever the CPU.
function(td_amx_test name source library)
  add_executable(amx_${name} ${source} $<TARGET_OBJECTS:td_amx_emulated>)
  target_compile_options(amx_${name} PRIVATE ${TD_WARN})
  target_compile_definitions(amx_${name} PRIVATE ${ARGN})
  target_include_directories(amx_${name} PRIVATE ${CMAKE_SOURCE_DIR})
  target_link_libraries(amx_${name} PRIVATE ${library})
  set_target_properties(amx_${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_test(NAME amx/${name} COMMAND amx_${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(amx/${name} PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 1200)
endfunction()
td_amx_test(test_tile tests/amx/test_tile.c td_kernels)
td_amx_test(test_choose tests/amx/test_choose.c td_engine)
# Tests of all families, with this one alone.
foreach(t kernels/test_gemm kernels/test_attn kernels/test_moe worker/test_forward)
  get_filename_component(n ${t} NAME)
  td_amx_test(${n} tests/${t}.c td_engine td_ops_family=td_amx_family)
endforeach()

if(TARGET td_ship) # for e2e/test_handshake.py
  add_executable(amx_tandem_worker worker/main.c $<TARGET_OBJECTS:td_amx_emulated>)
  target_include_directories(amx_tandem_worker PRIVATE ${CMAKE_SOURCE_DIR})
  target_link_libraries(amx_tandem_worker PRIVATE td_ship)
  set_target_properties(amx_tandem_worker PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
endif()
