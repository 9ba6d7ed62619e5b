/* common/build.h - which program this is: the version, and the identity that the linker computed from its contents (the GNU build id
 * note), so that two builds of one version are told apart.
 *
 * Threads: any. Never NULL, at most 63 bytes: "0.1.0-3f9c02d1a4b7", or the version alone where the program has no such note. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_BUILD_H
#define TD_COMMON_BUILD_H

const char *td_build(void);

#endif
