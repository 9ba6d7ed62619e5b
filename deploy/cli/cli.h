/* deploy/cli/cli.h - the subcommands of `tandem`. Each parses its own options (common/conf.h) from argv[1..] and returns an exit
 * status. Cluster commands live in cluster_*.c and are left out of an engine-only build. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_DEPLOY_CLI_CLI_H
#define TD_DEPLOY_CLI_CLI_H

int cmd_logits(int argc, char **argv);
int cmd_bench_engine(int argc, char **argv);
int cmd_bench_kernels(int argc, char **argv);
int cmd_serve(int argc, char **argv);
int cmd_launch(int argc, char **argv);
int cmd_rank(int argc, char **argv);
int cmd_chat(int argc, char **argv);
int cmd_keys(int argc, char **argv);
int cmd_bench_serve(int argc, char **argv);

#endif
