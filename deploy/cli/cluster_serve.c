/* tandem serve MODEL_DIR: a local cluster until SIGINT or SIGTERM. */
// SPDX-License-Identifier: Apache-2.0
#include "common/log.h"
#include "deploy/cli/cli.h"
#include "deploy/cli/cluster_local.h"
#include <stdio.h>

int cmd_serve(int argc, char **argv)
{
    td_conf conf;
    const char *dir = NULL;
    int n = 0, status = 1;
    td_log_open("serve", TD_LOG_INFO);
    td_status s = td_conf_parse(&conf, TD_CONF_SERVE, argc, argv, &dir, 1, &n);
    if (s == TD_AGAIN) return 0;
    if (s < 0) {
        fprintf(stderr, "tandem serve: %s\n", td_reason_take());
        return 2;
    }
    td_log_open("serve", td_log_parse(conf.log_level));
    bool dummy = conf.load_format[0] == 'd';
    if (n) td_conf_set(&conf, "model", dir);
    if (!conf.model[0] && !dummy) {
        fprintf(stderr, "tandem serve: which model? give its directory: tandem serve MODEL_DIR\n");
        td_conf_deinit(&conf);
        return 2;
    }
    td_local *local = NULL;
    s = td_local_start(&conf, false, &local);
    if (s == TD_OK) {
        s = td_local_wait_ready(local);
        if (s < 0 && s != TD_EGONE) fprintf(stderr, "tandem serve: %s\n", td_reason_take());
        td_fail_hold(false);
        status = s == TD_OK ? td_local_run(local) : s == TD_EGONE ? 0 : 1;
        td_local_stop(local);
    } else {
        fprintf(stderr, "tandem serve: %s\n", td_reason_take());
        status = s == TD_EBADREQ ? 2 : 1;
    }
    td_conf_deinit(&conf);
    return status;
}
