/* common/build.h - which build this program is: the version, and what the linker made of everything in it (the build id of
 * ELF), so that two builds of one version are told apart and two copies of one build are not.
 *
 * Threads: any. Errors: none; a program without a build id has its version alone. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_BUILD_H
#define TD_COMMON_BUILD_H

#include <stddef.h>

void td_build_name(char *out, size_t cap); /* "0.1.0 7d01da60..." */

#endif
