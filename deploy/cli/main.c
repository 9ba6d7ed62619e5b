/* tandem - the command: finds the subcommand and hands over. */
// SPDX-License-Identifier: Apache-2.0
#include "common/build.h"
#include "common/status.h"
#include "deploy/cli/cli.h"
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static const struct command {
    const char *name, *sub;
    int (*run)(int argc, char **argv);
    const char *help;
} commands[] = {
    {"serve", NULL, cmd_serve, "start a local cluster (router and workers) on a model directory"},
    {"launch-worker", NULL, cmd_launch, "start one worker of many ranks with mpirun, watch it, start it again"},
    {"rank", NULL, cmd_rank, NULL},
    {"keys", NULL, cmd_keys, "make the secret key of a cluster on several machines"},
    {"chat", NULL, cmd_chat, "talk to a server (--url) or to a model directory"},
    {"logits", NULL, cmd_logits, "logits of every position, from and to safetensors"},
    {"bench", "engine", cmd_bench_engine, "prefill and decode speed of the engine, with shares of the machine's limits"},
    {"bench", "kernels", cmd_bench_kernels, "each large kernel of a model's shape, with shares of the machine's limits"},
    {"bench", "serve", cmd_bench_serve, "load a server: TTFT, TPOT, ITL, goodput"},
};
enum { N_COMMANDS = sizeof commands / sizeof commands[0] };

static int usage(FILE *f, int status)
{
    fprintf(f, "tandem %s: serve large language models from separate prefill and decode workers\n\n", TD_VERSION);
    for (int i = 0; i < N_COMMANDS; i++) {
        if (!commands[i].help) continue;
        fprintf(f, "  tandem %s%s%-*s %s\n", commands[i].name, commands[i].sub ? " " : "",
                (int)(16 - strlen(commands[i].name)) - (commands[i].sub != NULL), commands[i].sub ? commands[i].sub : "", commands[i].help);
    }
    fprintf(f, "\n`tandem COMMAND --help` lists a command's options with defaults, ranges and units.\n");
    return status;
}

/* A command's last line says why it failed: once. */
static int run(const struct command *c, int argc, char **argv)
{
    td_fail_hold(true);
    int status = c->run(argc, argv);
    td_fail_hold(false);
    return status;
}

int main(int argc, char **argv)
{
    if (argc < 2) return usage(stderr, 2);
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) return usage(stdout, 0);
    if (!strcmp(argv[1], "--version")) return printf("tandem %s\n", td_build()) < 0;
    bool group = false;
    for (int i = 0; i < N_COMMANDS; i++) {
        const struct command *c = &commands[i];
        if (strcmp(argv[1], c->name)) continue;
        group = c->sub != NULL;
        if (!c->sub) return run(c, argc - 1, argv + 1);
        if (argc > 2 && !strcmp(argv[2], c->sub)) return run(c, argc - 2, argv + 2);
    }
    bool second = argc > 2 && argv[2][0] != '-';
    fprintf(stderr, "tandem: %s '%s%s%s'\n\n", group && !second ? "what of" : "no command", argv[1], second ? " " : "", second ? argv[2] : "");
    return usage(stderr, 2);
}
