/* tandem keys FILE: the secret key of a cluster that leaves one machine (--curve-secret-file). */
// SPDX-License-Identifier: Apache-2.0
#include "common/status.h"
#include "common/wire/sock.h"
#include "deploy/cli/cli.h"
#include <stdio.h>
#include <string.h>

int cmd_keys(int argc, char **argv)
{
    bool help = argc == 2 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"));
    if (help || argc != 2 || argv[1][0] == '-') {
        fprintf(help ? stdout : stderr,
                "usage: tandem keys FILE\n\n"
                "Makes the secret key of a cluster and writes it to FILE, which must not exist (mode 0600). The\n"
                "router and every worker of the cluster get the same file (--curve-secret-file FILE): what goes\n"
                "between them is encrypted, and who has another key is refused.\n");
        return help ? 0 : 2;
    }
    td_curve key;
    td_curve_generate(&key);
    if (td_curve_save(&key, argv[1], NULL) == TD_OK) return 0;
    fprintf(stderr, "tandem keys: %s\n", td_reason_take());
    return 1;
}
