/* tests/router/support_tok.c - writes the folder and opens it. */
// SPDX-License-Identifier: Apache-2.0
#include "tests/router/support_tok.h"
#include "common/utf8.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char dir[64];
static td_tokenizer *tok;

static void put(const char *name, const char *text)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f)) {
        perror(path);
        exit(1);
    }
}

/* GPT-2's printable stand-ins for the bytes. */
static uint32_t stand_in(int b, int *next)
{
    if ((b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE) return (uint32_t)b;
    return 256u + (uint32_t)(*next)++;
}

const char *support_model_dir(void)
{
    if (dir[0]) return dir;
    snprintf(dir, sizeof dir, "/tmp/td-router-test-XXXXXX");
    if (!mkdtemp(dir)) exit(1);
    char json[20000];
    size_t n = 0;
    int next = 0;
    n += (size_t)sprintf(json + n, "{\"version\":\"1.0\",\"added_tokens\":["
                                   "{\"id\":256,\"content\":\"<eos>\",\"single_word\":false,\"lstrip\":false,"
                                   "\"rstrip\":false,\"normalized\":false,\"special\":true},"
                                   "{\"id\":257,\"content\":\"<bos>\",\"single_word\":false,\"lstrip\":false,"
                                   "\"rstrip\":false,\"normalized\":false,\"special\":true}],"
                                   "\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_"
                                   "prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},"
                                   "\"post_processor\":null,\"decoder\":{\"type\":\"ByteLevel\"},"
                                   "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,"
                                   "\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,"
                                   "\"fuse_unk\":false,\"byte_fallback\":false,\"vocab\":{");
    for (int b = 0; b < 256; b++) {
        char u[5] = "";
        u[td_utf8_put(u, stand_in(b, &next))] = 0;
        n += (size_t)sprintf(json + n, "%s\"%s%s\":%d", b ? "," : "",
                             !strcmp(u, "\"") || !strcmp(u, "\\") ? "\\" : "", u, b);
    }
    sprintf(json + n, "},\"merges\":[]}}");
    put("tokenizer.json", json);
    put("tokenizer_config.json", "{\"eos_token\":\"<eos>\",\"bos_token\":\"<bos>\",\"chat_template\":"
                                 "\"{% for m in messages %}[{{ m.role }}]{{ m.content }}\\n{% endfor %}{% if "
                                 "add_generation_prompt %}[assistant]{% endif %}\"}");
    put("generation_config.json",
        "{\"eos_token_id\":256,\"do_sample\":true,\"temperature\":0.5,\"top_k\":7}");
    put("config.json",
        "{\"eos_token_id\":256,\"vocab_size\":258,\"max_position_embeddings\":512,\"model_type\":\"llama\"}");
    return dir;
}

const td_tokenizer *support_tokenizer(void)
{
    if (tok) return tok;
    if (td_tokenizer_open(support_model_dir(), &tok) != TD_OK) {
        printf("tokenizer: %s\n", td_reason());
        exit(1);
    }
    return tok;
}

void support_tokenizer_close(void)
{
    td_tokenizer_close(tok);
    tok = NULL;
    static const char *const name[] = {"tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                       "config.json"};
    for (unsigned i = 0; i < 4 && dir[0]; i++) {
        char path[128];
        snprintf(path, sizeof path, "%s/%s", dir, name[i]);
        unlink(path);
    }
    if (dir[0]) rmdir(dir);
    dir[0] = 0;
}
