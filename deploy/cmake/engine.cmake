# SPDX-License-Identifier: Apache-2.0
# The engine: common, kernels, model loading, scheduling. Needs libc and pthreads only.
td_library(td_base GLOB common/*.c LINK Threads::Threads m)
td_library(td_kernels GLOB kernels/*.c LINK td_base)
td_library(td_engine GLOB worker/*.c worker/model/*.c worker/coll/*.c LINK td_kernels)
if(TARGET td_engine)
  get_target_property(td_engine_type td_engine TYPE)
  if(td_engine_type STREQUAL "STATIC_LIBRARY")
    get_target_property(src td_engine SOURCES)
    list(FILTER src EXCLUDE REGEX "/worker/(main|control[a-z_]*|mirror|rank_ship|beat)\\.c$")
    set_target_properties(td_engine PROPERTIES SOURCES "${src}")
  endif()
endif()
# Kernel families: each file is compiled for its own instruction set and chosen at run time.
function(td_isa pattern)
  file(GLOB f CONFIGURE_DEPENDS ${pattern})
  if(f)
    set_source_files_properties(${f} PROPERTIES COMPILE_OPTIONS "${ARGN}")
  endif()
endfunction()
td_isa(kernels/*_avx2.c -mavx2;-mfma;-mf16c;-mbmi2;-O3)
td_isa(kernels/*_avx512.c -march=x86-64-v4;-mprefer-vector-width=512;-O3)
td_isa(kernels/*_avx512bf16.c -march=x86-64-v4;-mavx512bf16;-mprefer-vector-width=512;-O3)
td_isa(kernels/*_amx.c -march=x86-64-v4;-mavx512bf16;-mprefer-vector-width=512;-O3)

# Optional back ends: AUTO takes what the machine has, ON insists, OFF leaves out. Whole files come and go; nothing depends on them inside.
set(TD_SUMMARY "CPU kernels for ${CMAKE_SYSTEM_PROCESSOR}")
include(deploy/cmake/cuda.cmake)
include(deploy/cmake/coll.cmake)
# Engine, kernels and model loading as one name. With -DTD_CLUSTER=OFF -DTD_MPI=OFF it needs libc and pthreads, and where they are
# CUDA and cuBLASLt; tests/gpu/run looks at what was linked (tests/gpu/built.py).
add_library(tandem_engine INTERFACE)
target_link_libraries(tandem_engine INTERFACE td_engine td_kernels td_base)
if(TD_CLUSTER)
  string(APPEND TD_SUMMARY "; cluster yes")
else()
  string(APPEND TD_SUMMARY "; cluster off (engine and tools only)")
endif()
