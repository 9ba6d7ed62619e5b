/* Cluster commands of an engine-only build (TD_CLUSTER=OFF): they say so. */
// SPDX-License-Identifier: Apache-2.0
#include "deploy/cli/cli.h"
#include <stdio.h>

static int absent(const char *name)
{
    fprintf(stderr, "tandem %s: this build has the engine only (configured with TD_CLUSTER=OFF)\n", name);
    return 2;
}

int cmd_serve(int argc, char **argv) { return (void)argc, (void)argv, absent("serve"); }
int cmd_launch(int argc, char **argv) { return (void)argc, (void)argv, absent("launch-worker"); }
int cmd_rank(int argc, char **argv) { return (void)argc, (void)argv, absent("rank"); }
int cmd_chat(int argc, char **argv) { return (void)argc, (void)argv, absent("chat"); }
int cmd_keys(int argc, char **argv) { return (void)argc, (void)argv, absent("keys"); }
int cmd_bench_serve(int argc, char **argv) { return (void)argc, (void)argv, absent("bench serve"); }
