/* tests/simt/support_staged.h - the CUDA operations as a family with host pointers. Tests of tests/kernels are compiled
 * with td_ops_family replaced by this. Threads: one. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SIMT_SUPPORT_STAGED_H
#define TD_TESTS_SIMT_SUPPORT_STAGED_H

#include "kernels/ops.h"

const td_ops *td_staged_family(int i); /* 0: the table; NULL past it */

#endif
