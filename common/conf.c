// SPDX-License-Identifier: Apache-2.0
/* common/conf.c - a table made from TD_CONF_MAP and a few functions that walk it. Flags are read first (so
 * that --help and their errors do not depend on the environment), then the environment, then the file; a
 * source never overrides a stronger one. */
#include "common/conf.h"
#include "common/build.h"
#include "common/check.h"
#include "common/log.h"
#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FILE_BYTES = 1 << 20, NAME_MAX_BYTES = 64 };

typedef enum { INT, AUTO, POW2, U64, REAL, BOOL, STR, CHOICE, BYTES } type;

typedef struct option {
    type type;
    const char *name;
    char short_flag;
    const char *dflt;
    double lo, hi;
    const char *unit;
    unsigned programs;
    const char *help;
    size_t offset;
} option;

static const option options[TD_CONF_COUNT] = {
#define X(t, field, name, flag, dflt, lo, hi, unit, programs, help) \
    {t, name, flag, dflt, lo, hi, unit, programs, help, offsetof(td_conf, field)},
    TD_CONF_MAP(X)
#undef X
};

/* ---- one value ---- */

static void *field(td_conf *c, const option *o)
{
    return (char *)c + o->offset;
}

static const void *field_const(const td_conf *c, const option *o)
{
    return (const char *)c + o->offset;
}

static void number_text(const option *o, double v, char out[32])
{
    static const char *const suffix[] = {"", "K", "M", "G", "T"};
    int s = 0;
    while (o->type == BYTES && s < 4 && v >= 1024 && fmod(v, 1024) == 0) {
        v /= 1024;
        s++;
    }
    if (v == floor(v) && fabs(v) < 1e15) snprintf(out, 32, "%.0f%s", v, suffix[s]);
    else if (o->type == U64) snprintf(out, 32, "%llu", (unsigned long long)UINT64_MAX);
    else snprintf(out, 32, "%g%s", v, suffix[s]);
}

static td_status out_of_range(const option *o, const char *value)
{
    char lo[32], hi[32];
    number_text(o, o->lo, lo);
    number_text(o, o->hi, hi);
    return td_refuse(TD_EBADREQ, "%s: %s is out of range: %s to %s%s%s", o->name, value, lo, hi,
                     *o->unit ? " " : "", o->unit);
}

static td_status not_a(const option *o, const char *value, const char *what)
{
    return td_refuse(TD_EBADREQ, "%s: '%.80s' is not %s", o->name, value, what);
}

/* Whole text is one decimal number, optionally with a byte suffix. */
static td_status read_int(const option *o, const char *value, int64_t *out)
{
    char *end;
    errno = 0;
    long long v = strtoll(value, &end, 10);
    bool numeric = end != value && !isspace((unsigned char)*value);
    const char *suffixes = "KMGT";
    int shift = 0;
    if (numeric && o->type == BYTES && *end) {
        const char *s = strchr(suffixes, toupper((unsigned char)*end));
        if (s) {
            shift = (int)(s - suffixes + 1) * 10;
            end++;
            if (*end == 'i') end++;
            if (*end == 'B') end++;
        }
    }
    if (!numeric || *end)
        return not_a(o, value, o->type == BYTES ? "a number of bytes (such as 512M)" : "a whole number");
    if (errno || v > INT64_MAX >> shift || v < -(INT64_MAX >> shift)) return out_of_range(o, value);
    *out = v * (1ll << shift);
    return (double)*out < o->lo || (double)*out > o->hi ? out_of_range(o, value) : TD_OK;
}

static td_status read_bool(const option *o, const char *value, bool *out)
{
    static const char *const yes[] = {"true", "1", "yes", "on"}, *const no[] = {"false", "0", "no", "off"};
    for (size_t i = 0; i < TD_COUNT(yes); i++) {
        if (!strcmp(value, yes[i])) return *out = true, TD_OK;
        if (!strcmp(value, no[i])) return *out = false, TD_OK;
    }
    return not_a(o, value, "true or false");
}

static td_status read_real(const option *o, const char *value, double *out)
{
    char *end;
    double v = strtod(value, &end);
    if (end == value || *end || isspace((unsigned char)*value) || isnan(v))
        return not_a(o, value, "a number");
    if (v < o->lo || v > o->hi) return out_of_range(o, value);
    *out = v;
    return TD_OK;
}

static td_status read_u64(const option *o, const char *value, uint64_t *out)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(value, &end, 10);
    if (!isdigit((unsigned char)*value) || *end) return not_a(o, value, "a whole number of 0 or more");
    if (errno) return out_of_range(o, value);
    *out = v;
    return TD_OK;
}

static td_status read_string(const option *o, const char *value, const char **out)
{
    size_t n = strlen(value);
    if (n > (size_t)o->hi) return td_refuse(TD_EBADREQ, "%s: longer than %.0f bytes", o->name, o->hi);
    if (n < (size_t)o->lo) return td_refuse(TD_EBADREQ, "%s: may not be empty", o->name);
    *out = value;
    return TD_OK;
}

static td_status read_choice(const option *o, const char *value, const char **out)
{
    size_t n = strlen(value);
    for (const char *p = o->unit; *p; p += strcspn(p, "|"), p += *p == '|') {
        if (strcspn(p, "|") != n || memcmp(p, value, n)) continue;
        *out = value;
        return TD_OK;
    }
    return td_refuse(TD_EBADREQ, "%s: '%.80s' is not one of %s", o->name, value, o->unit);
}

static bool takes_auto(const option *o)
{
    return o->type == AUTO || (o->type == BYTES && o->lo <= 0);
}

static td_status assign(td_conf *c, const option *o, const char *value, td_conf_source source)
{
    void *f = field(c, o);
    int64_t v = 0;
    switch (o->type) {
    case BOOL: TD_TRY(read_bool(o, value, f)); break;
    case REAL: TD_TRY(read_real(o, value, f)); break;
    case U64: TD_TRY(read_u64(o, value, f)); break;
    case STR: TD_TRY(read_string(o, value, f)); break;
    case CHOICE: TD_TRY(read_choice(o, value, f)); break;
    case INT:
    case AUTO:
    case POW2:
    case BYTES:
        if (!takes_auto(o) || strcmp(value, "auto")) TD_TRY(read_int(o, value, &v));
        if (o->type == POW2 && (v & (v - 1))) return not_a(o, value, "a power of two");
        if (o->type == BYTES) *(int64_t *)f = v;
        else *(int *)f = (int)v;
    }
    c->source[o - options] = (uint8_t)source;
    return TD_OK;
}

void td_conf_init(td_conf *c)
{
    memset(c, 0, sizeof *c);
    for (size_t i = 0; i < TD_CONF_COUNT; i++)
        TD_CHECK(assign(c, &options[i], options[i].dflt, TD_CONF_DEFAULT) == TD_OK);
}

void td_conf_deinit(td_conf *c)
{
    free(c->file_text);
    c->file_text = NULL;
}

/* ---- names ---- */

static int distance(const char *a, size_t na, const char *b, size_t nb)
{
    int row[NAME_MAX_BYTES + 1];
    na = TD_MIN(na, (size_t)NAME_MAX_BYTES);
    nb = TD_MIN(nb, (size_t)NAME_MAX_BYTES);
    for (size_t j = 0; j <= nb; j++) row[j] = (int)j;
    for (size_t i = 1; i <= na; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            best = TD_MIN(best, row[j] + 1);
            row[j] = TD_MIN(best, row[j - 1] + 1);
        }
    }
    return row[nb];
}

static const option *find(const char *name, size_t n, unsigned programs)
{
    for (const option *o = options; o < options + TD_CONF_COUNT; o++)
        if ((o->programs & programs) && strlen(o->name) == n && !memcmp(o->name, name, n)) return o;
    return NULL;
}

static const option *nearest_option(const char *name, size_t n, unsigned programs, int *best_d)
{
    const option *best = NULL;
    for (size_t i = 0; i < TD_CONF_COUNT; i++) {
        if (!(options[i].programs & programs)) continue;
        int d = distance(name, n, options[i].name, strlen(options[i].name));
        if (best && d >= *best_d) continue;
        *best_d = d;
        best = &options[i];
    }
    return best;
}

static const char *nearest(const char *name, size_t n, unsigned programs)
{
    int d = 0;
    const option *best = nearest_option(name, n, programs, &d);
    return best && d < distance(name, n, "help", 4) ? best->name : "help";
}

static const struct { unsigned bit; const char *name, *arguments; } programs[] = {
    {TD_CONF_ROUTER, "tandem-router", ""},
    {TD_CONF_WORKER, "tandem-worker", ""},
    {TD_CONF_SERVE, "tandem serve", " [MODEL]"},
    {TD_CONF_CHAT, "tandem chat", ""},
    {TD_CONF_BENCH_ENGINE, "tandem bench engine", " [MODEL]"},
    {TD_CONF_BENCH_SERVE, "tandem bench serve", ""},
    {TD_CONF_BENCH_KERNELS, "tandem bench kernels", ""},
    {TD_CONF_LOGITS, "tandem logits", " [MODEL]"},
    {TD_CONF_LAUNCH, "tandem launch-worker", " -- [options of tandem-worker]"},
};

static size_t program_index(unsigned program)
{
    size_t i = 0;
    while (i < TD_COUNT(programs) && programs[i].bit != program) i++;
    TD_CHECK(i < TD_COUNT(programs));
    return i;
}

static void env_name(const option *o, char out[NAME_MAX_BYTES])
{
    int n = snprintf(out, NAME_MAX_BYTES, "TANDEM_%s", o->name);
    for (int i = 0; i < n; i++) out[i] = out[i] == '-' ? '_' : (char)toupper((unsigned char)out[i]);
}

/* ---- help ---- */

static void print_option(const option *o)
{
    char env[NAME_MAX_BYTES], lo[32], hi[32], shown[96];
    env_name(o, env);
    int n = snprintf(shown, sizeof shown, o->short_flag ? "  -%c, " : "      ", o->short_flag);
    const char *metavar = o->type == CHOICE ? "WORD" : *o->unit ? o->unit : "NUMBER";
    if (o->type == BOOL) snprintf(shown + n, sizeof shown - (size_t)n, "--[no-]%s", o->name);
    else snprintf(shown + n, sizeof shown - (size_t)n, "--%s <%s>", o->name, metavar);
    printf("%s\n          %s\n          [default: %s", shown, o->help, *o->dflt ? o->dflt : "none");
    if (o->type == CHOICE) printf("; one of: %s", o->unit);
    if (o->type != CHOICE && o->type != STR && o->type != BOOL) {
        number_text(o, o->lo, lo);
        number_text(o, o->hi, hi);
        printf("; range: %s to %s%s", lo, hi, o->type == POW2 ? ", a power of two" : "");
        if (*o->unit) printf("; unit: %s", o->unit);
    }
    printf("; env: %s]\n", env);
}

static void print_help(unsigned program)
{
    size_t p = program_index(program);
    printf("usage: %s [options]%s\n\n"
           "A flag wins over its environment variable, that over the --config file (`name: value` lines),\n"
           "that over the default.\n\n",
           programs[p].name, programs[p].arguments);
    for (size_t i = 0; i < TD_CONF_COUNT; i++)
        if (options[i].programs & program) print_option(&options[i]);
    printf("  -h, --help\n          print this\n      --version\n          print the version\n");
}

/* ---- sources ---- */

static td_status unknown_flag(const char *arg, const char *name, size_t n, unsigned program)
{
    if (find(name, n, ~0u))
        return td_refuse(TD_EBADREQ, "--%.*s is not an option of %s", (int)TD_MIN(n, 64u), name,
                         programs[program_index(program)].name);
    return td_refuse(TD_EBADREQ, "unknown flag %.64s: did you mean --%s?", arg, nearest(name, n, program));
}

/* One flag at argv[*i], which starts with '-'; *i is left at its last word. */
static td_status take_flag(td_conf *c, unsigned program, int argc, char **argv, int *i)
{
    const char *arg = argv[*i], *name = arg + 1 + (arg[1] == '-');
    size_t n = strcspn(name, "=");
    const char *value = name[n] ? name + n + 1 : NULL;
    const option *o = NULL;
    bool negated = false;
    if (arg[1] == '-') {
        o = find(name, n, program);
        if (!o && n > 3 && !strncmp(name, "no-", 3)) {
            o = find(name + 3, n - 3, program);
            negated = o && o->type == BOOL;
            if (!negated) o = NULL;
        }
        if (!o) return unknown_flag(arg, name, n, program);
    } else {
        for (size_t k = 0; k < TD_CONF_COUNT && n == 1; k++)
            if ((options[k].programs & program) && options[k].short_flag == *name) o = &options[k];
        if (!o) return td_refuse(TD_EBADREQ, "unknown flag %.64s: see --help", arg);
    }
    if (o->type == BOOL) {
        if (negated && value) return td_refuse(TD_EBADREQ, "--no-%s takes no value", o->name);
        return assign(c, o, negated ? "false" : value ? value : "true", TD_CONF_FLAG);
    }
    if (!value) {
        if (*i + 1 >= argc) return td_refuse(TD_EBADREQ, "--%s needs a value", o->name);
        value = argv[++*i];
    }
    return assign(c, o, value, TD_CONF_FLAG);
}

static td_status take_argv(td_conf *c, unsigned program, int argc, char **argv, const char **positional,
                           int max, int *n_positional)
{
    bool flags = true;
    for (int i = 1; i < argc; i++) {
        if (flags && !strcmp(argv[i], "--")) {
            flags = false;
        } else if (flags && argv[i][0] == '-' && argv[i][1]) {
            TD_TRY(take_flag(c, program, argc, argv, &i));
        } else {
            if (*n_positional >= max) return td_refuse(TD_EBADREQ, "unexpected argument '%.80s'", argv[i]);
            positional[(*n_positional)++] = argv[i];
        }
    }
    return TD_OK;
}

extern char **environ;

static bool in_env(const char *first, size_t n, const char *rest)
{
    for (char **e = environ; e && *e; e++)
        if (!strncmp(*e, first, n) && !strncmp(*e + n, rest, strlen(rest)) && (*e)[n + strlen(rest)] == '=')
            return true;
    return false;
}

/* Kubernetes tells every container of the Services beside it: of one called tandem as TANDEM_SERVICE_HOST,
 * TANDEM_SERVICE_PORT.., TANDEM_PORT (tcp://IP:PORT) and TANDEM_PORT_8000_TCP... Nobody meant those for us. */
static bool service_link(const char *name, const char *value)
{
    for (const char *s = strchr(name, '_'); s; s = strchr(s + 1, '_')) {
        bool of_service = !strncmp(s, "_SERVICE_HOST", 13) || !strncmp(s, "_SERVICE_PORT", 13);
        bool of_port = !strncmp(s, "_PORT_", 6) && isdigit((unsigned char)s[6]);
        bool port = !strcmp(s, "_PORT") && strstr(value, "://");
        if ((of_service || of_port || port) && in_env(name, (size_t)(s - name), "_SERVICE_HOST")) return true;
    }
    return false;
}

static bool script_name(const char *name)
{
    static const char *const ours[] = {"TANDEM_BUILD", "TANDEM_BIN", "TANDEM_ROOT", "TANDEM_CONTROL_PORT",
                                       "TANDEM_LAUNCH_DIR"};
    for (size_t i = 0; i < TD_COUNT(ours); i++)
        if (!strcmp(name, ours[i])) return true;
    return !strncmp(name, "TANDEM_TEST_", 12);
}

/* A TANDEM_ name that is no option of any program: said, not refused, since others set variables too. False: it
 * is one, or is known. */
static bool unknown_env(const char *name, const char *value, td_log_level level)
{
    char text[NAME_MAX_BYTES], other[NAME_MAX_BYTES];
    size_t n = TD_MIN(strlen(name + 7), sizeof text);
    int d;
    if (!*value || script_name(name) || service_link(name, value)) return false;
    for (size_t i = 0; i < n; i++)
        text[i] = name[7 + i] == '_' ? '-' : (char)tolower((unsigned char)name[7 + i]);
    const option *o = nearest_option(text, n, ~0u, &d);
    env_name(o, other);
    if (!strcmp(name, other)) return false;
    if (level >= TD_LOG_WARN)
        TD_WARN("environment %.80s is no option and is ignored: did you mean %s?", name, other);
    return true;
}

/* Each is said once: it is taken out of the environment, so that child processes do not say it again. */
static void warn_of_env(const td_conf *c)
{
    td_log_level level = td_log_parse(c->log_level);
    for (char **e = environ; e && *e;) {
        const char *eq = strchr(*e, '=');
        char name[256];
        if (strncmp(*e, "TANDEM_", 7) || !eq || (size_t)(eq - *e) >= sizeof name) {
            e++;
            continue;
        }
        memcpy(name, *e, (size_t)(eq - *e));
        name[eq - *e] = '\0';
        if (unknown_env(name, eq + 1, level))
            unsetenv(name); /* moves the later ones down */
        else
            e++;
    }
}

static td_status take_env(td_conf *c, unsigned program)
{
    for (size_t i = 0; i < TD_CONF_COUNT; i++) {
        if (!(options[i].programs & program) || c->source[i] > TD_CONF_ENV) continue;
        char name[NAME_MAX_BYTES];
        env_name(&options[i], name);
        const char *value = getenv(name);
        if (!value || !*value || service_link(name, value)) continue;
        if (assign(c, &options[i], value, TD_CONF_ENV) == TD_OK) continue;
        return td_refuse(TD_EBADREQ, "environment %s: %s", name, td_reason());
    }
    return TD_OK;
}

static char *trim(char *s, char *end)
{
    while (s < end && isspace((unsigned char)*s)) s++;
    while (end > s && isspace((unsigned char)end[-1])) end--;
    *end = '\0';
    return s;
}

/* The value of a line: quoted text as it stands, else up to a comment. */
static td_status line_value(char **value)
{
    char *s = *value, quote = *s;
    if (quote == '"' || quote == '\'') {
        char *end = strchr(s + 1, quote);
        if (!end) return td_refuse(TD_EBADREQ, "the closing quote is missing");
        char *rest = trim(end + 1, end + strlen(end));
        if (*rest && *rest != '#') return td_refuse(TD_EBADREQ, "text after the closing quote");
        *end = '\0';
        *value = s + 1;
        return TD_OK;
    }
    for (char *p = s; *p; p++)
        if (*p == '#' && (p == s || isspace((unsigned char)p[-1]))) {
            *value = trim(s, p);
            break;
        }
    return TD_OK;
}

static td_status unknown_option(const char *name)
{
    return td_refuse(TD_EBADREQ, "unknown option '%.64s': did you mean %s?", name,
                     nearest(name, strlen(name), ~0u));
}

static td_status take_line(td_conf *c, unsigned program, char *line)
{
    line = trim(line, line + strlen(line));
    if (!*line || *line == '#') return TD_OK;
    char *colon = strchr(line, ':');
    if (!colon) return td_refuse(TD_EBADREQ, "expected `name: value`");
    char *value = trim(colon + 1, colon + strlen(colon));
    char *name = trim(line, colon);
    TD_TRY(line_value(&value));
    const option *o = find(name, strlen(name), ~0u);
    if (!o) return unknown_option(name);
    if (o - options == TD_CONF_ID_config) return td_refuse(TD_EBADREQ, "a config file cannot name another");
    if (!(o->programs & program) || c->source[o - options] > TD_CONF_FILE) {
        td_conf scratch = {0}; /* checked all the same, so that one bad line stops every program alike */
        return assign(&scratch, o, value, TD_CONF_FILE);
    }
    return assign(c, o, value, TD_CONF_FILE);
}

static td_status read_file(const char *path, char **text)
{
    FILE *f = fopen(path, "rbe");
    if (!f) return td_refuse(TD_EBADREQ, "config file %s: %s", path, strerror(errno));
    char *t = td_xalloc(FILE_BYTES + 2);
    size_t n = fread(t, 1, FILE_BYTES + 1, f);
    bool failed = ferror(f) != 0;
    fclose(f);
    if (!failed && n <= FILE_BYTES && !memchr(t, 0, n)) {
        *text = t;
        return TD_OK;
    }
    free(t);
    const char *why = failed           ? "cannot be read"
                      : n > FILE_BYTES ? "larger than 1 MiB"
                                       : "contains a zero byte";
    return td_refuse(TD_EBADREQ, "config file %s: %s", path, why);
}

static td_status take_file(td_conf *c, unsigned program)
{
    if (!*c->config) return TD_OK;
    TD_TRY(read_file(c->config, &c->file_text));
    int number = 1;
    for (char *line = c->file_text, *next; line; line = next, number++) {
        next = strchr(line, '\n');
        if (next) *next++ = '\0';
        if (take_line(c, program, line) != TD_OK)
            return td_refuse(TD_EBADREQ, "config file %s line %d: %s", c->config, number, td_reason());
    }
    return TD_OK;
}

td_status td_conf_parse(td_conf *c, unsigned program, int argc, char **argv, const char **positional,
                        int max_positional, int *n_positional)
{
    td_conf_init(c);
    int count = 0;
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++) {
        bool help = !strcmp(argv[i], "--help") || !strcmp(argv[i], "-h");
        if (!help && strcmp(argv[i], "--version")) continue;
        if (help) print_help(program);
        else printf("tandem %s\n", td_build());
        return TD_AGAIN;
    }
    td_status s = take_argv(c, program, argc, argv, positional, max_positional, &count);
    if (s == TD_OK) s = take_env(c, program);
    if (s == TD_OK) s = take_file(c, program);
    if (s == TD_OK) warn_of_env(c);
    if (s == TD_OK && n_positional) *n_positional = count;
    return s;
}

td_status td_conf_set(td_conf *c, const char *name, const char *value)
{
    const option *o = find(name, strlen(name), ~0u);
    if (!o) return unknown_option(name);
    return assign(c, o, value, TD_CONF_FLAG);
}

/* ---- to a child ---- */

static bool same_value(const option *o, const void *a, const void *b)
{
    switch (o->type) {
    case INT:
    case AUTO:
    case POW2: return *(const int *)a == *(const int *)b;
    case U64: return *(const uint64_t *)a == *(const uint64_t *)b;
    case BYTES: return *(const int64_t *)a == *(const int64_t *)b;
    case REAL: return *(const double *)a == *(const double *)b;
    case BOOL: return *(const bool *)a == *(const bool *)b;
    case STR:
    case CHOICE: return !strcmp(*(const char *const *)a, *(const char *const *)b);
    }
    return false;
}

static void value_text(const option *o, const void *f, char out[32])
{
    switch (o->type) {
    case INT:
    case POW2: snprintf(out, 32, "%d", *(const int *)f); break;
    case AUTO: snprintf(out, 32, *(const int *)f ? "%d" : "auto", *(const int *)f); break;
    case U64: snprintf(out, 32, "%llu", (unsigned long long)*(const uint64_t *)f); break;
    case BYTES: snprintf(out, 32, "%lld", (long long)*(const int64_t *)f); break;
    case REAL: snprintf(out, 32, "%.17g", *(const double *)f); break;
    case BOOL: snprintf(out, 32, "%s", *(const bool *)f ? "true" : "false"); break;
    case STR:
    case CHOICE: break;
    }
}

/* "--name=value" in one word: a value that starts with '-' stays a value. */
static char *render(const td_conf *c, const option *o, td_arena *a)
{
    char small[32];
    const char *value = small;
    if (o->type == STR || o->type == CHOICE) value = *(const char *const *)field_const(c, o);
    else value_text(o, field_const(c, o), small);
    size_t n = strlen(o->name) + strlen(value) + 4;
    char *word = td_arena_alloc(a, n);
    if (word) snprintf(word, n, "--%s=%s", o->name, value);
    return word;
}

int td_conf_to_argv(const td_conf *c, unsigned program, td_arena *a, char **argv, int max)
{
    td_conf dflt;
    td_conf_init(&dflt);
    int n = 0;
    for (size_t i = 0; i < TD_CONF_COUNT; i++) {
        const option *o = &options[i];
        bool unchanged = same_value(o, field_const(c, o), field_const(&dflt, o));
        if (!(o->programs & program) || (o->programs & TD_CONF_OWN)) continue;
        if (unchanged && c->source[i] == TD_CONF_DEFAULT) continue;
        bool hidden = c->source[i] == TD_CONF_ENV || c->source[i] == TD_CONF_FILE;
        if ((o->programs & TD_CONF_SECRET) && hidden) continue;
        char *word = n + 1 < max ? render(c, o, a) : NULL;
        if (!word) return -1;
        argv[n++] = word;
    }
    if (n >= max) return -1;
    argv[n] = NULL;
    return n;
}

bool td_conf_to_text(const td_conf *c, unsigned of, char *out, size_t cap)
{
    size_t n = 0;
    for (const option *o = options; o < options + TD_CONF_COUNT; o++) {
        char small[32];
        const char *value = small;
        if (!(o->programs & of) || (o->programs & TD_CONF_PLACE)) continue;
        if (o->type == STR || o->type == CHOICE)
            value = *(const char *const *)field_const(c, o);
        else
            value_text(o, field_const(c, o), small);
        n += (size_t)snprintf(out + n, cap - n, "%s: %s\n", o->name, value);
        if (n >= cap) return false;
    }
    return true;
}
