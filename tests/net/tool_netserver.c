// SPDX-License-Identifier: Apache-2.0
/* The toy server as a program, for tests/net/test_h2.py: prints its two ports, runs until stdin closes, then
 * prints its counts. Arguments NAME=VALUE: body (bytes), header, mark, streams, idle, header_us, body_us,
 * slow, drain (us), cert, key, ca (files). */
#include "tests/net/support_toy.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *text_option(int argc, char **argv, const char *name)
{
    size_t n = strlen(name);
    for (int i = 1; i < argc; i++)
        if (!strncmp(argv[i], name, n) && argv[i][n] == '=') return argv[i] + n + 1;
    return NULL;
}

static long option(int argc, char **argv, const char *name)
{
    const char *text = text_option(argc, argv, name);
    return text ? atol(text) : 0;
}

int main(int argc, char **argv)
{
    static toy t;
    td_net_opts o = {
        .max_body_bytes = (size_t)option(argc, argv, "body"),
        .max_header_bytes = (size_t)option(argc, argv, "header"),
        .high_mark_bytes = (size_t)option(argc, argv, "mark"),
        .max_streams = (int)option(argc, argv, "streams"),
        .idle_us = option(argc, argv, "idle"),
        .header_us = option(argc, argv, "header_us"),
        .body_us = option(argc, argv, "body_us"),
        .slow_reader_us = option(argc, argv, "slow"),
        .drain_us = option(argc, argv, "drain"),
        .tls_cert_file = text_option(argc, argv, "cert"),
        .tls_key_file = text_option(argc, argv, "key"),
        .tls_client_ca_file = text_option(argc, argv, "ca"),
    };
    toy_open(&t, o);
    printf("%d %d\n", t.port, t.grpc_port);
    fflush(stdout);
    while (getchar() != EOF) {}
    toy_close(&t);
    printf("lost=%d live=%d handled=%d max_unsent=%ld\n", t.lost, t.jobs_live, t.handled, (long)t.max_unsent);
    return 0;
}
