// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_boot.c - from options to an open model: config.json is read once, whatever asks for it. */
#include "tests/t.h"
#include "common/check.h"
#include "common/log.h"
#include "worker/boot.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TEXT = 1 << 14 };

/* A folder with that config.json (NULL: none) and no weights. */
static void make_dir(char *dir, const char *config)
{
    char path[128];
    strcpy(dir, "/tmp/td-boot-XXXXXX");
    TD_CHECK(mkdtemp(dir));
    if (!config) return;
    snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *f = fopen(path, "w");
    TD_CHECK(f && fputs(config, f) >= 0 && !fclose(f));
}

static void drop_dir(const char *dir)
{
    char path[128];
    snprintf(path, sizeof path, "%s/config.json", dir);
    unlink(path);
    TD_CHECK(!rmdir(dir));
}

/* Opens a model of random weights in the shape that dir says, and returns what was logged. */
static const char *logged(const char *dir, td_status *status)
{
    static char text[TEXT];
    char *argv[] =
        {"logits", "--load-format", "dummy", "--threads", "1", "--no-pack-cache", "--max-num-batched-tokens",
         "16"},
         path[] = "/tmp/td-boot-log-XXXXXX";
    const char *none[1];
    int n_none = 0, old = dup(2), f = mkstemp(path);
    TD_CHECK(old >= 0 && f >= 0 && dup2(f, 2) == 2);
    td_conf conf = {0};
    td_boot b;
    *status = td_conf_parse(&conf, TD_CONF_LOGITS, (int)TD_COUNT(argv), argv, none, 1, &n_none);
    if (*status >= 0) *status = td_boot_open(&conf, dir, 0, NULL, &b);
    if (*status >= 0) td_boot_close(&b);
    td_conf_deinit(&conf);
    ssize_t n = pread(f, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    TD_CHECK(dup2(old, 2) == 2);
    close(old), close(f), unlink(path);
    return text;
}

static void test_read_once(void)
{
    char dir[64];
    td_status s;
    make_dir(dir,
             "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_size\": 64,"
             " \"intermediate_size\": 96, \"num_hidden_layers\": 2, \"num_attention_heads\": 4,"
             " \"num_key_value_heads\": 2, \"vocab_size\": 128, \"max_position_embeddings\": 64,"
             " \"rms_norm_eps\": 1e-5, \"never_heard_of\": 1}");
    const char *text = logged(dir, &s),
               *line = "config.json: ignoring a key that is not known here: never_heard_of",
               *at = strstr(text, line);
    T_OK(s == TD_OK, "%s", td_reason());
    T_OK(at && !strstr(at + 1, line), "not once: %s", text);
    drop_dir(dir);
}

static void test_refused(void)
{
    char dir[64];
    td_status s;
    make_dir(dir, NULL);
    const char *text = logged(dir, &s), *line = "no config.json in the model folder",
               *at = strstr(text, line);
    T_EQ(s, TD_EIO);
    T_OK(at && !strstr(at + 1, line), "not once: %s", text);
    drop_dir(dir);
}

int main(void)
{
    td_log_open("test", TD_LOG_INFO);
    test_read_once();
    test_refused();
    return T_DONE();
}
