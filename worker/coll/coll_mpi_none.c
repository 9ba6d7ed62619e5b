// SPDX-License-Identifier: Apache-2.0
/* worker/coll/coll_mpi_none.c - in builds without MPI, in the place of coll_mpi.c (deploy/cmake/coll.cmake).
 */
#include "worker/coll/coll.h"

td_status td_coll_mpi_open(int *argc, char ***argv, td_coll **out)
{
    (void)argc, (void)argv, (void)out;
    return td_fail(TD_ENOSUP, "this build has no MPI: install libopenmpi-dev openmpi-bin and build again");
}
