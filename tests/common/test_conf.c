// SPDX-License-Identifier: Apache-2.0
/* Precedence, every form of a flag, every error text, help, the config file, and what a child process is given. */
#include "tests/said.h"
#include "tests/t.h"
#include "common/check.h"
#include "common/log.h"
#include "common/conf.h"
#include <ctype.h>
#include <unistd.h>

enum { MAX_WORDS = 16 };
static td_conf conf;
static const char *positional[4];
static int n_positional;

/* Words are separated by a blank; "_" stands for an empty word. */
static td_status parse(unsigned program, const char *line)
{
    static char text[4][65536];
    static int turn;
    char *argv[MAX_WORDS] = {"program"}, *t = text[turn++ % 4], *save;
    int argc = 1;
    snprintf(t, sizeof text[0], "%s", line);
    for (char *w = strtok_r(t, " ", &save); w && argc < MAX_WORDS; w = strtok_r(NULL, " ", &save))
        argv[argc++] = strcmp(w, "_") ? w : "";
    td_conf_deinit(&conf);
    n_positional = 0;
    td_refuse(TD_OK, "none");
    return td_conf_parse(&conf, program, argc, argv, positional, 2, &n_positional);
}

static const char *refusal(unsigned program, const char *line)
{
    td_status s = parse(program, line);
    return s == TD_EBADREQ ? td_reason() : "accepted";
}

static char file_path[] = "/tmp/td_test_conf_XXXXXX";
static const char *with_file(const char *text, const char *args)
{
    static char line[300];
    FILE *f = fopen(file_path, "w");
    fputs(text, f);
    fclose(f);
    snprintf(line, sizeof line, "--config %s %s", file_path, args);
    return line;
}

static void test_forms(void)
{
    T_EQ(parse(TD_CONF_SERVE, ""), TD_OK);
    T_OK(conf.prefill == 1 && conf.decode == 1 && conf.mixed == 0 && conf.port == 8000 && conf.grpc_port == 8001);
    T_OK(conf.threads == 0 && conf.max_model_len == 0 && conf.kv_memory == 0 && conf.page_size == 16 &&
         conf.max_num_seqs == 64);
    T_OK(conf.max_body_bytes == 8 << 20 && conf.pack_cache && conf.debug_endpoints && !conf.insecure &&
         conf.ready_fd == -1);
    T_STR(conf.host, "127.0.0.1");
    T_STR(conf.router_bind, "tcp://127.0.0.1:5570");
    T_EQ(parse(TD_CONF_SERVE, "model --max-num-seqs 8 --kv-memory=3G --insecure --no-pack-cache -t 4 other"), TD_OK);
    T_OK(conf.max_num_seqs == 8 && conf.kv_memory == 3ll << 30 && conf.insecure && !conf.pack_cache &&
         conf.threads == 4);
    T_EQ(n_positional, 2);
    T_STR(positional[0], "model");
    T_STR(positional[1], "other");
    T_EQ(conf.source[TD_CONF_ID_max_num_seqs], TD_CONF_FLAG);
    T_EQ(conf.source[TD_CONF_ID_page_size], TD_CONF_DEFAULT);
    T_EQ(
        parse(TD_CONF_SERVE,
              "--insecure=false --pack-cache=on --max-num-seqs 8 --max-num-seqs 9 --threads auto --api-key="),
        TD_OK);
    T_OK(!conf.insecure && conf.pack_cache && conf.max_num_seqs == 9 && conf.threads == 0);
    T_STR(conf.api_key, "");
    T_EQ(parse(TD_CONF_CHAT, "-p hello -n=7 --temperature 0.25"), TD_OK);
    T_STR(conf.prompt, "hello");
    T_OK(conf.max_tokens == 7 && conf.temperature == 0.25);
    T_EQ(parse(TD_CONF_BENCH_ENGINE, "-p 100 -n 10 -B 1,2 -r 2 -t 3 --json -"), TD_OK);
    T_OK(conf.prompt_len == 100 && conf.gen_len == 10 && conf.repeats == 2 && conf.threads == 3);
    T_STR(conf.batch, "1,2");
    T_STR(conf.json, "-");
    T_EQ(parse(TD_CONF_CHAT, "-p -x -- --no"), TD_OK);
    T_STR(conf.prompt, "-x");
    T_STR(positional[0], "--no");
    T_EQ(parse(TD_CONF_WORKER, "--ready-fd -1 --seed 18446744073709551615"), TD_OK);
    T_OK(conf.seed == UINT64_MAX);
    T_EQ(parse(TD_CONF_ROUTER, "--max-body-bytes 64KiB"), TD_OK);
    T_EQ(conf.max_body_bytes, 65536);
}

static void test_refusals(void)
{
    static const struct { unsigned program; const char *line, *reason;
    } c[] = {
        {TD_CONF_SERVE, "--max-num-seq 1", "unknown flag --max-num-seq: did you mean --max-num-seqs?"},
        {TD_CONF_SERVE, "--prot=1", "unknown flag --prot=1: did you mean --port?"},
        {TD_CONF_SERVE, "--no-port", "unknown flag --no-port: did you mean --port?"},
        {TD_CONF_WORKER, "--port 1", "--port is not an option of tandem-worker"},
        {TD_CONF_WORKER, "-p 1", "unknown flag -p: see --help"},
        {TD_CONF_SERVE, "--port 65536", "port: 65536 is out of range: 0 to 65535 port"},
        {TD_CONF_SERVE, "--max-num-seqs 0", "max-num-seqs: 0 is out of range: 1 to 1024 sequences"},
        {TD_CONF_SERVE, "--max-body-bytes 99999999999999999999",
         "max-body-bytes: 99999999999999999999 is out of range: 1K to 1G bytes"},
        {TD_CONF_SERVE, "--kv-memory 9223372036854775807G",
         "kv-memory: 9223372036854775807G is out of range: 0 to 16T bytes"},
        {TD_CONF_SERVE, "--kv-memory -9223372036854775808",
         "kv-memory: -9223372036854775808 is out of range: 0 to 16T bytes"},
        {TD_CONF_SERVE, "--kv-memory 17179869185G",
         "kv-memory: 17179869185G is out of range: 0 to 16T bytes"},
        {TD_CONF_SERVE, "--max-body-bytes auto",
         "max-body-bytes: 'auto' is not a number of bytes (such as 512M)"},
        {TD_CONF_SERVE, "--kv-memory 5X", "kv-memory: '5X' is not a number of bytes (such as 512M)"},
        {TD_CONF_SERVE, "--max-num-seqs 8x", "max-num-seqs: '8x' is not a whole number"},
        {TD_CONF_SERVE, "--max-num-seqs _", "max-num-seqs: '' is not a whole number"},
        {TD_CONF_SERVE, "--max-num-seqs auto", "max-num-seqs: 'auto' is not a whole number"},
        {TD_CONF_SERVE, "--page-size 24", "page-size: '24' is not a power of two"},
        {TD_CONF_SERVE, "--page-size 256", "page-size: 256 is out of range: 1 to 128 tokens"},
        {TD_CONF_SERVE, "--page-size auto", "page-size: 'auto' is not a whole number"},
        {TD_CONF_SERVE, "--port", "--port needs a value"},
        {TD_CONF_SERVE, "--insecure=maybe", "insecure: 'maybe' is not true or false"},
        {TD_CONF_SERVE, "--no-insecure=1", "--no-insecure takes no value"},
        {TD_CONF_SERVE, "--ops sse", "ops: 'sse' is not one of auto|ref|avx2|avx512|avx512bf16|amx|cuda"},
        {TD_CONF_SERVE, "--ops avx", "ops: 'avx' is not one of auto|ref|avx2|avx512|avx512bf16|amx|cuda"},
        {TD_CONF_SERVE, "--ops _", "ops: '' is not one of auto|ref|avx2|avx512|avx512bf16|amx|cuda"},
        {TD_CONF_SERVE, "--host _", "host: may not be empty"},
        {TD_CONF_SERVE, "--seed -1", "seed: '-1' is not a whole number of 0 or more"},
        {TD_CONF_SERVE, "--seed 18446744073709551616",
         "seed: 18446744073709551616 is out of range: 0 to 18446744073709551615"},
        {TD_CONF_CHAT, "--temperature nan", "temperature: 'nan' is not a number"},
        {TD_CONF_CHAT, "--temperature 2.5", "temperature: 2.5 is out of range: 0 to 2"},
        {TD_CONF_SERVE, "a b c", "unexpected argument 'c'"},
        {TD_CONF_SERVE, "--config /nonexistent/x", "config file /nonexistent/x: No such file or directory"},
    };
    for (size_t i = 0; i < TD_COUNT(c); i++) T_STR(refusal(c[i].program, c[i].line), c[i].reason);
    static char longer[400];
    snprintf(longer, sizeof longer, "--host=%0300d", 0);
    T_STR(refusal(TD_CONF_SERVE, longer), "host: longer than 255 bytes");
}

static void test_sources(void)
{
    setenv("TANDEM_MAX_NUM_SEQS", "10", 1);
    setenv("TANDEM_PORT", "", 1);
    T_EQ(parse(TD_CONF_SERVE, ""), TD_OK);
    T_OK(conf.max_num_seqs == 10 && conf.port == 8000);
    T_EQ(conf.source[TD_CONF_ID_max_num_seqs], TD_CONF_ENV);
    const char *text = "# a cluster's file\nmax-num-seqs: 11\n\npage-size: 32   # tokens\n  host : \"a # b\"  # c\r\n"
                       "served-model-name: 'x'\nurl: http://h:1/#x\npack-cache: no";
    T_EQ(parse(TD_CONF_SERVE, with_file(text, "")), TD_OK);
    T_EQ(conf.max_num_seqs, 10);
    T_EQ(conf.page_size, 32);
    T_STR(conf.host, "a # b");
    T_STR(conf.served_model_name, "x");
    T_OK(!conf.pack_cache);
    T_EQ(conf.source[TD_CONF_ID_page_size], TD_CONF_FILE);
    T_STR(conf.url, "http://127.0.0.1:8000"); /* another program's option: allowed and not taken */
    T_EQ(parse(TD_CONF_SERVE, with_file(text, "--max-num-seqs 12 --page-size=64")), TD_OK);
    T_OK(conf.max_num_seqs == 12 && conf.page_size == 64);
    T_EQ(parse(TD_CONF_CHAT, with_file(text, "")), TD_OK);
    T_STR(conf.url, "http://h:1/#x");
    unsetenv("TANDEM_MAX_NUM_SEQS");
    T_EQ(parse(TD_CONF_SERVE, with_file(text, "")), TD_OK);
    T_EQ(conf.max_num_seqs, 11);
    setenv("TANDEM_CONFIG", file_path, 1);
    T_EQ(parse(TD_CONF_SERVE, ""), TD_OK);
    T_EQ(conf.max_num_seqs, 11);
    unsetenv("TANDEM_CONFIG");
    setenv("TANDEM_PORT", "x", 1);
    T_STR(refusal(TD_CONF_SERVE, ""), "environment TANDEM_PORT: port: 'x' is not a whole number");
    T_EQ(parse(TD_CONF_SERVE, "--port 5"), TD_OK);
    T_EQ(parse(TD_CONF_WORKER, ""), TD_OK);
    unsetenv("TANDEM_PORT");
    static const struct { const char *text, *reason; } c[] = {
        {"\nprot: 1", "line 2: unknown option 'prot': did you mean port?"},
        {"port 1", "line 1: expected `name: value`"},
        {"port: 1\nport: 70000", "line 2: port: 70000 is out of range: 0 to 65535 port"},
        {"ids: \"1", "line 1: the closing quote is missing"},
        {"host: \"a\" b", "line 1: text after the closing quote"},
        {"config: x", "line 1: a config file cannot name another"},
        {"url: _", "accepted"},
        {"temperature: 9", "line 1: temperature: 9 is out of range: 0 to 2"}, /* another program's, still checked */
    };
    for (size_t i = 0; i < TD_COUNT(c); i++) {
        const char *got = refusal(TD_CONF_SERVE, with_file(c[i].text, "")), *line = strstr(got, "line ");
        T_STR(line ? line : got, c[i].reason);
    }
    FILE *f = fopen(file_path, "w");
    for (int i = 0; i < 1 << 20; i++) fputs("# ", f);
    fclose(f);
    char line[100];
    snprintf(line, sizeof line, "--config=%s", file_path);
    T_OK(strstr(refusal(TD_CONF_SERVE, line), "larger than 1 MiB"));
    f = fopen(file_path, "w");
    fwrite("port: 1\0\n", 1, 9, f);
    fclose(f);
    T_OK(strstr(refusal(TD_CONF_SERVE, line), "zero byte"));
}

/* What a parse with these flags writes to stderr. */
static const char *warned(const char *line)
{
    said_begin();
    td_status s = parse(TD_CONF_SERVE, line);
    const char *text = said_end(), *at = strstr(text, " W ");
    T_OK(s == TD_OK, "%s", td_reason());
    return at ? at : text;
}

static void test_unknown_environment(void)
{
    td_log_open("test", TD_LOG_INFO);
    /* nothing to say of options, of other programs' too, of what our scripts take, of what is empty */
    static const char *const quiet[] = {"TANDEM_MAX_NUM_SEQS=10", "TANDEM_URL=http://h", "TANDEM_BUILD=x",
                                        "TANDEM_TEST_SEED=1",     "TANDEM_WRONG=",       "TANDEMX=1"};
    for (size_t i = 0; i < TD_COUNT(quiet); i++) TD_CHECK(!putenv((char *)(uintptr_t)quiet[i]));
    T_STR(warned(""), "");
    setenv("TANDEM_MAX_NUM_SEQ", "10", 1);
    T_STR(warned(""), " W test environment TANDEM_MAX_NUM_SEQ is no option and is ignored: did you mean "
                      "TANDEM_MAX_NUM_SEQS?\n");
    T_OK(!getenv("TANDEM_MAX_NUM_SEQ"), "a child would say it again");
    T_STR(warned(""), "");
    setenv("TANDEM_PROT", "1", 1);
    T_STR(warned("--log-level error"), "");
    setenv("TANDEM_PROT", "1", 1);
    setenv("TANDEM_KV_PAGE", "1", 1);
    const char *two = warned("--log-level warn");
    T_OK(strstr(two, "TANDEM_PROT is no option") && strstr(two, "did you mean TANDEM_PORT?") &&
             strstr(two, "did you mean TANDEM_KV_PAGES?"),
         "%s", two);
    char name[300];
    snprintf(name, sizeof name, "TANDEM_%0200d", 1);
    setenv(name, "1", 1);
    T_OK(strstr(warned(""), "TANDEM_000"), "%s", name);
    /* Services called tandem and tandem-router */
    static const char *const links[] = {"TANDEM_SERVICE_HOST=10.96.0.7",
                                        "TANDEM_SERVICE_PORT=8000",
                                        "TANDEM_SERVICE_PORT_HTTP=8000",
                                        "TANDEM_PORT=tcp://10.96.0.7:8000",
                                        "TANDEM_PORT_8000_TCP=tcp://10.96.0.7:8000",
                                        "TANDEM_PORT_8000_TCP_ADDR=10.96.0.7",
                                        "TANDEM_ROUTER_SERVICE_HOST=10.96.0.8",
                                        "TANDEM_ROUTER_SERVICE_PORT=8000",
                                        "TANDEM_ROUTER_PORT=tcp://10.96.0.8:8000",
                                        "TANDEM_ROUTER_PORT_8000_TCP_PROTO=tcp",
                                        "TANDEM_GRPC_SERVICE_HOST=10.96.0.9",
                                        "TANDEM_GRPC_PORT=tcp://10.96.0.9:8001"};
    for (size_t i = 0; i < TD_COUNT(links); i++) TD_CHECK(!putenv((char *)(uintptr_t)links[i]));
    T_STR(warned(""), "");
    T_OK(conf.port == 8000 && conf.grpc_port == 8001, "%d, %d", (int)conf.port, (int)conf.grpc_port);
    setenv("TANDEM_PORT", "8123", 1); /* of the container: it wins over the Service's there */
    T_STR(warned(""), "");
    T_EQ(conf.port, 8123);
    unsetenv("TANDEM_ROUTER_SERVICE_HOST"); /* then these are no Service's */
    const char *of_none = warned("");
    T_OK(strstr(of_none, "TANDEM_ROUTER_SERVICE_PORT is no option") &&
             strstr(of_none, "TANDEM_ROUTER_PORT is no option"),
         "%s", of_none);
    for (size_t i = 0; i < TD_COUNT(quiet); i++)
        snprintf(name, sizeof name, "%.*s", (int)strcspn(quiet[i], "="), quiet[i]), unsetenv(name);
    for (size_t i = 0; i < TD_COUNT(links); i++)
        snprintf(name, sizeof name, "%.*s", (int)strcspn(links[i], "="), links[i]), unsetenv(name);
}

/* What ranks compare: every option of theirs but a place's own. */
static void test_text(void)
{
    static const char *const pairs[][2] = {{"--page-size 8", "page-size: 8\n"},
                                           {"--no-prefix-cache", "prefix-cache: false\n"},
                                           {"--kv-memory 1M", "kv-memory: 1048576\n"},
                                           {"--seed 18446744073709551615", "seed: 18446744073709551615\n"},
                                           {"--ops ref", "ops: ref\n"},
                                           {"--router ipc:///x", "router: ipc:///x\n"},
                                           {"--eplb-interval 3", "eplb-interval: 3\n"},
                                           {"--credits 9", "credits: 9\n"}};
    char plain[4096], text[4096];
    T_EQ(parse(TD_CONF_WORKER, ""), TD_OK);
    T_OK(td_conf_to_text(&conf, TD_CONF_WORKER, plain, sizeof plain));
    for (size_t i = 0; i < TD_COUNT(pairs); i++) {
        T_EQ(parse(TD_CONF_WORKER, pairs[i][0]), TD_OK);
        T_OK(td_conf_to_text(&conf, TD_CONF_WORKER, text, sizeof text));
        T_OK(!strstr(plain, pairs[i][1]) && strstr(text, pairs[i][1]), "%s", pairs[i][1]);
    }
    T_EQ(parse(TD_CONF_WORKER,
               "--threads 3 --device 1 --name x --cache-dir /x --log-level error --bulk-bind tcp://h:*"),
         TD_OK);
    T_OK(td_conf_to_text(&conf, TD_CONF_WORKER, text, sizeof text));
    T_STR(text, plain);
    T_OK(!strstr(plain, "\nport: "), "an option of the router's");
    for (size_t cap = strlen(plain); cap > 0; cap--) T_OK(!td_conf_to_text(&conf, TD_CONF_WORKER, text, cap));
    T_OK(td_conf_to_text(&conf, TD_CONF_WORKER, text, strlen(plain) + 1));
}

static void test_child(void)
{
    td_arena a;
    char *argv[64];
    td_arena_init(&a, 1 << 16);
    setenv("TANDEM_API_KEY", "secret", 1);
    setenv("TANDEM_MAX_QUEUE", "77", 1);
    T_EQ(parse(TD_CONF_SERVE,
               "--page-size 32 --max-num-seqs 64 --kv-memory 1M --no-prefix-cache --host=::1 --prefill 3"),
         TD_OK);
    T_STR(conf.api_key, "secret");
    conf.role = "prefill";
    conf.router = "ipc:///run/x";
    conf.ready_fd = 7;
    int n = td_conf_to_argv(&conf, TD_CONF_WORKER, &a, argv, 64);
    static const char *const want[] = {"--router=ipc:///run/x", "--role=prefill", "--prefix-cache=false",
                                       "--kv-memory=1048576",   "--page-size=32", "--max-num-seqs=64"};
    T_EQ(n, TD_COUNT(want));
    for (int i = 0; i < n && i < (int)TD_COUNT(want); i++) T_STR(argv[i], want[i]);
    T_OK(n < 0 || argv[n] == NULL);
    n = td_conf_to_argv(&conf, TD_CONF_ROUTER, &a, argv, 64);
    T_EQ(n, 2);
    T_STR(argv[0], "--host=::1");
    T_STR(argv[1], "--max-queue=77");
    T_EQ(td_conf_to_argv(&conf, TD_CONF_ROUTER, &a, argv, 2), -1);
    T_EQ(td_conf_to_argv(&conf, TD_CONF_ROUTER, &a, argv, 3), 2);
    td_arena tiny;
    td_arena_init(&tiny, 8);
    T_EQ(td_conf_to_argv(&conf, TD_CONF_ROUTER, &tiny, argv, 64), -1);
    T_EQ(parse(TD_CONF_SERVE, "--api-key k"), TD_OK);
    n = td_conf_to_argv(&conf, TD_CONF_ROUTER, &a, argv, 64);
    T_STR(argv[0], "--api-key=k");
    unsetenv("TANDEM_API_KEY");
    unsetenv("TANDEM_MAX_QUEUE");
    /* What is rendered parses back to the same values. */
    T_EQ(parse(TD_CONF_BENCH_SERVE,
               "--request-rate 0.1 --seed 18446744073709551615 --shared-prefix=0.30000000000000004"),
         TD_OK);
    td_conf before = conf;
    n = td_conf_to_argv(&conf, TD_CONF_BENCH_SERVE, &a, argv + 1, 60);
    argv[0] = "x";
    T_EQ(td_conf_parse(&conf, TD_CONF_BENCH_SERVE, n + 1, argv, NULL, 0, NULL), TD_OK);
    T_OK(conf.request_rate == before.request_rate && conf.seed == before.seed &&
         conf.shared_prefix == before.shared_prefix);
    test_text();
    T_EQ(td_conf_set(&conf, "max-num-seqs", "5"), TD_OK);
    T_EQ(conf.max_num_seqs, 5);
    T_EQ(td_conf_set(&conf, "max-num-seqs", "5000"), TD_EBADREQ);
    T_EQ(conf.max_num_seqs, 5);
    T_EQ(td_conf_set(&conf, "nothing", "5"), TD_EBADREQ);
    td_arena_deinit(&a);
}

static const char *printed(unsigned program, const char *line, td_status want)
{
    static char out[65536];
    fflush(stdout);
    int saved = dup(1);
    T_OK(freopen(file_path, "w+", stdout) != NULL);
    td_status s = parse(program, line);
    fflush(stdout);
    rewind(stdout);
    size_t n = fread(out, 1, sizeof out - 1, stdout);
    out[n] = '\0';
    dup2(saved, 1);
    close(saved);
    T_EQ(s, want);
    return out;
}

static void test_help(void)
{
    const char *h = printed(TD_CONF_SERVE, "--bogus --help", TD_AGAIN);
    T_OK(strstr(h, "usage: tandem serve [options] [MODEL]"));
    T_OK(strstr(h, "      --max-num-seqs <sequences>\n"));
    T_OK(strstr(h, "[default: 64; range: 1 to 1024; unit: sequences; env: TANDEM_MAX_NUM_SEQS]"));
    T_OK(strstr(h, "--[no-]insecure") && strstr(h, "one of: error|warn|info|debug|trace") &&
         strstr(h, "range: 1K to 1G"));
    T_OK(!strstr(h, "--ready-fd") && !strstr(h, "--num-prompts"));
    h = printed(TD_CONF_BENCH_ENGINE, "-h", TD_AGAIN);
    T_OK(strstr(h, "  -p, --prompt-len <tokens>") && strstr(h, "  -t, --threads <threads>"));
    h = printed(TD_CONF_ROUTER, "--version", TD_AGAIN);
    T_OK(!strncmp(h, "tandem 0.1.0-", 13) && strlen(h) == 13 + 12 + 1, "%s", h); /* common/build.h */
    T_STR(printed(TD_CONF_SERVE, "-- --help", TD_OK), "");
}

/* Every option of every program: from the environment, from the file, and in --help with default, range and unit. */
static void test_every(void)
{
    static const struct {
        const char *type, *name, *by_default, *unit;
        unsigned programs, id;
        bool hidden;
    } all[] = {
#define X(type, field, name, short_flag, by_default, low, high, unit, programs, help) \
    {#type, name, by_default, unit, programs, TD_CONF_ID_##field, !(help)[0]},
        TD_CONF_MAP(X)
#undef X
    };
    static const unsigned programs[] = {TD_CONF_ROUTER, TD_CONF_WORKER, TD_CONF_SERVE, TD_CONF_CHAT, TD_CONF_BENCH_ENGINE,
                                        TD_CONF_BENCH_SERVE, TD_CONF_LOGITS, TD_CONF_BENCH_KERNELS};
    unsigned seen = 0;
    for (size_t i = 0; i < TD_COUNT(all); i++) {
        char env[64] = "TANDEM_", text[200];
        for (size_t k = 0; all[i].name[k]; k++) env[7 + k] = all[i].name[k] == '-' ? '_' : (char)toupper(all[i].name[k]), env[8 + k] = 0;
        if (!strcmp(all[i].name, "config")) continue;
        const char *value = all[i].by_default[0] ? all[i].by_default : "x";
        bool number = !strcmp(all[i].type, "INT") || !strcmp(all[i].type, "AUTO") || !strcmp(all[i].type, "POW2") ||
                      !strcmp(all[i].type, "U64") || !strcmp(all[i].type, "REAL") || !strcmp(all[i].type, "BYTES");
        for (size_t p = 0; p < TD_COUNT(programs); p++) {
            if (!(all[i].programs & programs[p])) continue;
            seen++;
            setenv(env, value, 1);
            T_OK(parse(programs[p], "") == TD_OK && conf.source[all[i].id] == TD_CONF_ENV, "%s=%s: %s", env, value, td_reason());
            unsetenv(env);
            snprintf(text, sizeof text, "%s: %s\n", all[i].name, value);
            T_OK(parse(programs[p], with_file(text, "")) == TD_OK && conf.source[all[i].id] == TD_CONF_FILE, "%s: %s", text, td_reason());
            const char *h = printed(programs[p], "--help", TD_AGAIN), *at = h, *end = NULL;
            snprintf(text, sizeof text, all[i].type[0] == 'B' && all[i].type[1] == 'O' ? "--[no-]%s\n" : "--%s <", all[i].name);
            if (!(at = strstr(h, text))) {
                T_OK(all[i].hidden, "%s is not in --help", all[i].name);
                continue;
            }
            at = strstr(at, "[default: ");
            end = at ? strchr(at, ']') : NULL;
            T_OK(at && end, "%s", all[i].name);
            if (!end) continue;
            snprintf(text, sizeof text, "%.*s", (int)(end - at), at);
            char last[80];
            snprintf(last, sizeof last, "; env: %s", env);
            T_OK(strlen(text) > strlen(last) && !strcmp(text + strlen(text) - strlen(last), last), "%s: %s", all[i].name, text);
            T_OK(!number || strstr(text, "; range: "), "%s: %s", all[i].name, text);
            snprintf(last, sizeof last, "; unit: %s;", all[i].unit);
            T_OK(!number || !all[i].unit[0] || strstr(text, last), "%s: %s", all[i].name, text);
        }
    }
    T_OK(seen > 200, "%u", seen);
}

int main(void)
{
    int fd = mkstemp(file_path);
    if (fd < 0) T_SKIP("no temporary file");
    close(fd);
    test_forms();
    test_refusals();
    test_sources();
    test_unknown_environment();
    test_child();
    test_help();
    test_every();
    td_conf_deinit(&conf);
    unlink(file_path);
    return T_DONE();
}
