// SPDX-License-Identifier: Apache-2.0
/* worker/coll/coll_nccl_none.c - in builds with TD_NCCL=OFF, in the place of coll_nccl.c. */
#include "worker/coll/coll.h"

td_status td_coll_nccl_find(int *version, const char **path)
{
    (void)version, (void)path;
    return td_fail(TD_ENOSUP, "this build has no NCCL (TD_NCCL=OFF)");
}

td_status td_coll_nccl_open(td_coll *host, int device, void *stream, int *version, td_coll **out)
{
    (void)host, (void)device, (void)stream, (void)version, (void)out;
    return td_fail(TD_ENOSUP, "this build has no NCCL (TD_NCCL=OFF)");
}
