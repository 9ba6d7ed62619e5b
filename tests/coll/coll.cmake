# SPDX-License-Identifier: Apache-2.0
# Helpers of tests/coll/test_mpi.py and test_nccl.py: a rank, a finder, and stand-ins of the device's libraries. gpu/nccl_ranks is
# for a machine with a device; test_nccl.py tries it as far as it goes without.
foreach(t coll/tool_ranks coll/tool_nccl gpu/nccl_ranks)
  get_filename_component(n ${t} NAME)
  add_executable(${n} tests/${t}.c tests/coll/support_cases.c)
  target_link_libraries(${n} PRIVATE td_engine)
  set_target_properties(${n} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
endforeach()
function(td_fake target source name dir)
  add_library(${target} SHARED ${source})
  target_compile_definitions(${target} PRIVATE ${ARGN})
  set_target_properties(${target} PROPERTIES PREFIX "" OUTPUT_NAME ${name} SUFFIX "" LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests/fake/${dir})
  add_dependencies(tool_nccl ${target})
endfunction()
td_fake(fake_nccl_new tests/coll/fake_nccl.c libnccl.so.2 new FAKE_VERSION=29999)
td_fake(fake_nccl_old tests/coll/fake_nccl.c libnccl.so.2 old FAKE_VERSION=22999)
td_fake(fake_cuda tests/coll/fake_cuda.c libcuda.so.1 .)
if(MPI_C_FOUND AND NOT TD_MPI STREQUAL "OFF") # it measures MPI's own ping-pong beside ours
  add_executable(bench_coll tests/bench/bench_coll.c)
  target_link_libraries(bench_coll PRIVATE td_engine)
  set_target_properties(bench_coll PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
endif()
