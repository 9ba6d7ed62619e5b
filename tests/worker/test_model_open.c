// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_model_open.c - opening models: refused checkpoints, dummy shapes, the image cache
 * (shared, broken, unusable), steps outside the model's limits, the on_layer call. */
#include "common/clock.h"
#include "common/log.h"
#include "tests/t.h"
#include "tests/worker/support_step.h"
#include "worker/model/image.h"
#include "worker/model/safetensors.h"
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static td_pool *pool;
static char dir[64];

static const td_ops *family(const char *name)
{
    for (int i = 0; td_ops_family(i); i++)
        if (!strcmp(td_ops_family(i)->family, name)) return td_ops_family(i);
    return NULL;
}

/* ref, and the best family if there is another */
static const td_ops *best(void)
{
    const td_ops *ops = NULL;
    return td_ops_open("auto", &ops) == TD_OK ? ops : family("ref");
}

/* ---- checkpoints that do not fit their config ---- */

static void path_of(char out[512], const char *name)
{
    snprintf(out, 512, "%s/%s", dir, name);
}

static void put_text(const char *name, const char *text)
{
    char path[512];
    path_of(path, name);
    FILE *f = fopen(path, "wb");
    T_OK(f && fwrite(text, 1, strlen(text), f) == strlen(text));
    if (f) fclose(f);
}

enum { E = 8, H = 2, G = 1, D = 4, F = 12, V = 20 };
static const char config[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":20,\"hidden_size\":8,\"intermediate_size\":12,"
    "\"num_hidden_layers\":1,\"num_attention_heads\":2,\"num_key_value_heads\":1,"
    "\"max_position_embeddings\":64,\"torch_dtype\":\"bfloat16\"}";

/* A one-layer checkpoint. `change` names a tensor to leave out (how 0), give another shape (1), another dtype
 * (2) or another weight dtype (3); how 4 adds an unknown one. */
static td_status open_changed(const char *change, int how, td_model **m)
{
    static const struct {
        const char *name;
        int rows, cols;
    } all[] = {
        {"model.embed_tokens.weight", V, E},
        {"model.norm.weight", E, 0},
        {"lm_head.weight", V, E},
        {"model.layers.0.input_layernorm.weight", E, 0},
        {"model.layers.0.post_attention_layernorm.weight", E, 0},
        {"model.layers.0.self_attn.q_proj.weight", H * D, E},
        {"model.layers.0.self_attn.k_proj.weight", G * D, E},
        {"model.layers.0.self_attn.v_proj.weight", G * D, E},
        {"model.layers.0.self_attn.o_proj.weight", E, H * D},
        {"model.layers.0.mlp.gate_proj.weight", F, E},
        {"model.layers.0.mlp.up_proj.weight", F, E},
        {"model.layers.0.mlp.down_proj.weight", E, F},
        {"model.layers.0.self_attn.rotary_emb.inv_freq", 2, 0},
        {"surprise", 1, 0},
    };
    static uint8_t zeros[8192];
    td_st_tensor t[16];
    size_t n = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        bool hit = !strcmp(all[i].name, change);
        if ((hit && how == 0) || (!strcmp(all[i].name, "surprise") && how != 4)) continue;
        t[n] = (td_st_tensor){
            .name = all[i].name, .dtype = TD_ST_BF16, .rank = all[i].cols ? 2 : 1, .data = zeros};
        t[n].shape[0] = all[i].rows;
        t[n].shape[1] = all[i].cols;
        if (hit && how == 1) t[n].shape[0]++;
        if (hit && how == 2) t[n].dtype = TD_ST_F8_E4M3;
        if (hit && how == 3) t[n].dtype = TD_ST_F32;
        n++;
    }
    char path[512];
    path_of(path, "model.safetensors");
    T_OK(td_safetensors_write(path, t, n) == TD_OK, "%s", td_reason());
    put_text("config.json", config);
    td_model_opts o = {.dir = dir, .ops = family("ref"), .pool = pool, .max_rows = 8, .max_logits = 8};
    return td_model_open(&o, m);
}

static void test_checkpoints(void)
{
    static const struct {
        const char *change;
        int how;
        td_status st;
        const char *reason;
    } cases[] = {
        {"", 0, TD_OK, ""},
        {"", 4, TD_OK, ""},
        {"model.norm.weight", 3, TD_OK, ""}, /* norms may be of any float type */
        {"model.norm.weight", 0, TD_EPROTO, "has no tensor \"model.norm.weight\""},
        {"lm_head.weight", 0, TD_EPROTO, "has no tensor \"lm_head.weight\""},
        {"model.layers.0.self_attn.k_proj.weight", 0, TD_EPROTO, "self_attn.k_proj.weight"},
        {"model.layers.0.mlp.up_proj.weight", 1, TD_EPROTO,
         "has shape [13, 8], config.json makes it [12, 8]"},
        {"model.layers.0.input_layernorm.weight", 1, TD_EPROTO, "has shape [9], config.json makes it [8]"},
        {"model.layers.0.mlp.down_proj.weight", 2, TD_ENOSUP, "dtype F8_E4M3 is not supported"},
        {"model.layers.0.self_attn.v_proj.weight", 3, TD_ENOSUP,
         "is f32, but the parts joined with it are bf16"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        td_model *m = NULL;
        td_status st = open_changed(cases[i].change, cases[i].how, &m);
        T_OK(st == cases[i].st && (st == TD_OK || strstr(td_reason(), cases[i].reason)), "%s: %s (%s)",
             cases[i].change, td_status_name(st), td_reason());
        td_model_close(m);
    }
    char path[512];
    path_of(path, "model.safetensors");
    unlink(path);
    td_model *m = NULL;
    td_model_opts o = {.dir = dir, .ops = family("ref"), .pool = pool, .max_rows = 8, .max_logits = 8};
    T_OK(td_model_open(&o, &m) == TD_EIO && !m);
    o.max_rows = 0;
    T_OK(td_model_open(&o, &m) == TD_EBADREQ);
    path_of(path, "config.json");
    unlink(path);
}

/* ---- one forward of given tokens ---- */

static void logits_of(td_model *m, const td_ops *ops, float *out)
{
    static const int32_t ids[9] = {3, 1, 4, 1, 5, 9, 2, 6, 5};
    ts_kv kv;
    ts_kv_open(&kv, td_model_descr(m), ops, 4, 16, 1);
    ts_seq q = {0, 0, 9, ids};
    td_step *s = ts_step(&kv, td_model_descr(m), &q, 1, false);
    T_OK(td_model_forward(m, s, kv.kv, out, NULL, NULL) == TD_OK, "%s", td_reason());
    free(s);
    ts_kv_close(&kv);
}

static td_model *open_model(const char *model_dir, const char *shape, const td_ops *ops, const char *cache)
{
    td_model *m = NULL;
    td_model_opts o = {.dir = model_dir,
                       .dummy_shape = shape,
                       .ops = ops,
                       .pool = pool,
                       .max_rows = 16,
                       .max_logits = 4,
                       .cache_dir = cache};
    T_OK(td_model_open(&o, &m) == TD_OK, "%s", td_reason());
    return m;
}

static void test_dummy(const td_ops *ops)
{
    td_model *a = open_model(NULL, "tiny", ops, NULL), *b = open_model(NULL, "tiny", ops, NULL);
    if (!a || !b) return;
    float x[2048], y[2048];
    logits_of(a, ops, x);
    logits_of(b, ops, y);
    bool finite = true, varied = false;
    for (int i = 0; i < 2048; i++) finite = finite && isfinite(x[i]), varied = varied || x[i] != x[0];
    T_OK(finite && varied && !memcmp(x, y, sizeof x), "%s: random weights are the same each time",
         ops->family);
    T_OK(td_model_weight_bytes(a) > 5000000 && td_model_descr(a)->digest.lo == td_model_descr(b)->digest.lo);
    td_model_close(a);
    td_model_close(b);
    a = open_model("tests/golden/models/llama-bias", "dir", ops, NULL); /* untied, with biases */
    if (!a) return;
    T_EQ(td_model_descr(a)->V, 320);
    logits_of(a, ops, x);
    for (int i = 0; i < 320; i++) finite = finite && isfinite(x[i]);
    T_OK(finite);
    td_model_close(a);
}

/* ---- the image ---- */

typedef struct maker {
    int calls;
    size_t n;
} maker;

static void make_bytes(void *arg, uint8_t *data)
{
    maker *k = arg;
    k->calls++;
    for (size_t i = 0; i < k->n; i++) data[i] = (uint8_t)(i * 7 + i / 4096);
}

static bool bytes_good(const td_image *im)
{
    for (size_t i = 0; i < im->bytes; i += 997)
        if (im->data[i] != (uint8_t)(i * 7 + i / 4096)) return false;
    return (uintptr_t)im->data % 64 == 0;
}

static int files_in(const char *d, const char *what, char *path, size_t cap)
{
    int n = 0;
    DIR *f = opendir(d);
    for (struct dirent *e; f && (e = readdir(f));)
        if (e->d_name[0] != '.' && strstr(e->d_name, what)) {
            n++;
            if (path) snprintf(path, cap, "%s/%s", d, e->d_name);
        }
    if (f) closedir(f);
    return n;
}

static void clear_dir(const char *d)
{
    char path[512];
    while (files_in(d, "", path, sizeof path) > 0 && unlink(path) == 0) {
    }
    rmdir(d);
}

static td_status open_im(td_image *im, const char *cache, uint32_t shard, maker *k)
{
    td_image_key key = {{1, 2}, {3, 4}, 1, shard, 2, 0};
    return td_image_open(im, cache, 0, &key, k->n, pool, make_bytes, k);
}

static void poke(const char *path, long at, const void *p, size_t n)
{
    int fd = open(path, O_WRONLY);
    T_OK(fd >= 0 && pwrite(fd, p, n, at) == (ssize_t)n);
    if (fd >= 0) close(fd);
}

static void test_image(void)
{
    char cache[128], path[512];
    td_image a, b;
    maker k = {0, (3 << 20) + 12345};
    snprintf(cache, sizeof cache, "%s/some/cache", dir);
    T_OK(open_im(&a, cache, 0, &k) == TD_OK && a.made && a.shared && bytes_good(&a) && k.calls == 1);
    T_OK(open_im(&b, cache, 0, &k) == TD_OK && !b.made && b.shared && bytes_good(&b) && k.calls == 1,
         "the second maps it");
    td_image_close(&b);
    T_OK(open_im(&b, cache, 1, &k) == TD_OK && b.made && k.calls == 2, "another shard is another file");
    td_image_close(&b);
    T_EQ(files_in(cache, ".image", NULL, 0), 4); /* two images, two locks */
    td_image_close(&a);
    clear_dir(cache);

    static const struct {
        long at;
        const char *what;
    } breaks[] = {
        {0, "magic"}, {8, "version"},      {12, "header CRC"},
        {20, "key"},  {4096, "chunk CRC"}, {8192 + 70000, "data"},
    };
    for (size_t i = 0; i < sizeof breaks / sizeof *breaks; i++) {
        k.calls = 0;
        T_OK(open_im(&a, cache, 0, &k) == TD_OK && k.calls == 1);
        td_image_close(&a);
        T_EQ(files_in(cache, "0of2.image", NULL, 0), 2);
        files_in(cache, "lock", path, sizeof path);
        unlink(path);
        files_in(cache, "0of2.image", path, sizeof path);
        poke(path, breaks[i].at, "\x99\x98\x97\x96", 4);
        T_OK(open_im(&a, cache, 0, &k) == TD_OK && k.calls == 2 && bytes_good(&a), "a broken %s is seen",
             breaks[i].what);
        td_image_close(&a);
        clear_dir(cache);
    }
    /* Written in another boot: every byte is checked, and the boot is renewed. */
    k.calls = 0;
    T_OK(open_im(&a, cache, 0, &k) == TD_OK);
    td_image_close(&a);
    files_in(cache, "lock", path, sizeof path);
    unlink(path);
    files_in(cache, "image", path, sizeof path);
    char boot[40], now[40];
    int fd = open(path, O_RDONLY);
    struct {
        char magic[8];
        uint32_t v, c;
        td_image_key key;
        uint32_t cc;
        uint64_t n, o;
    } head;
    long boot_at = (long)sizeof head;
    T_OK(pread(fd, boot, 40, boot_at) == 40 && boot[8] == 45, "the boot id is where the test thinks");
    poke(path, boot_at, "another", 7);
    T_OK(open_im(&a, cache, 0, &k) == TD_OK && k.calls == 1 && !a.made && bytes_good(&a));
    T_OK(pread(fd, now, 40, boot_at) == 40 && !memcmp(now, boot, 40), "marked as verified in this boot");
    td_image_close(&a);
    if (truncate(path, 8192) == 0)
        T_OK(open_im(&a, cache, 0, &k) == TD_OK && k.calls == 2 && bytes_good(&a), "truncated");
    td_image_close(&a);
    close(fd);
    clear_dir(cache);
    path_of(path, "some");
    rmdir(path);
}

static void test_image_unusable(void)
{
    char path[512];
    td_image a;
    maker k = {0, 100000};
    put_text("plain", "not a folder");
    path_of(path, "plain");
    T_OK(open_im(&a, path, 0, &k) == TD_OK && !a.shared && bytes_good(&a) && k.calls == 1,
         "a file as cache directory");
    td_image_close(&a);
    T_OK(open_im(&a, "/proc/none", 0, &k) == TD_OK && !a.shared && bytes_good(&a) && k.calls == 2);
    td_image_close(&a);
    T_OK(open_im(&a, NULL, 0, &k) == TD_OK && !a.shared && k.calls == 3);
    td_image_close(&a);
    k.n = 0;
    T_OK(open_im(&a, dir, 0, &k) == TD_OK && !a.data && k.calls == 3);
    unlink(path);
}

/* Four processes at once: one makes it. */
static void test_image_race(void)
{
    char cache[128];
    snprintf(cache, sizeof cache, "%s/race", dir);
    pid_t child[4];
    for (int i = 0; i < 4; i++) {
        child[i] = fork();
        if (child[i] == 0) {
            td_image a;
            maker k = {0, 4 << 20};
            td_image_key key = {{1, 2}, {3, 4}, 1, 0, 2, 0};
            td_pool *one = td_pool_open(1);
            bool ok = td_image_open(&a, cache, 0, &key, k.n, one, make_bytes, &k) == TD_OK && bytes_good(&a);
            _exit(ok ? k.calls : 9);
        }
    }
    int made = 0;
    for (int i = 0; i < 4; i++) {
        int st = 0;
        waitpid(child[i], &st, 0);
        T_OK(WIFEXITED(st) && WEXITSTATUS(st) <= 1);
        made += WEXITSTATUS(st);
    }
    T_EQ(made, 1);
    clear_dir(cache);
}

/* A lock file is removed (prune.c) between an opener's open and its lock: the opener must not take the dead one
 * for a lock, while another holds the new one. */
typedef struct opener {
    char cache[128], lock[300];
    maker k;
    td_image im;
    atomic_bool over;
} opener;
static void *open_it(void *arg)
{
    opener *o = arg;
    td_image_key key = {{7, 0}, {3, 4}, 1, 0, 1, 0};
    T_OK(td_image_open(&o->im, o->cache, 0, &key, o->k.n, pool, make_bytes, &o->k) == TD_OK && o->im.made);
    atomic_store(&o->over, true);
    return NULL;
}

/* How many descriptors of this process have the file that fd has. */
static int openings(int fd)
{
    struct stat a, b;
    int n = 0;
    for (int i = 0; i < 1024 && fstat(fd, &a) == 0; i++) n += fstat(i, &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev;
    return n;
}

static void test_image_lock_removed(void)
{
    opener o = {.k = {0, 1 << 16}};
    pthread_t t;
    snprintf(o.cache, sizeof o.cache, "%s/locked", dir);
    T_OK(mkdir(o.cache, 0755) == 0);
    td_image_key key = {{7, 0}, {3, 4}, 1, 0, 1, 0};
    T_OK(td_image_open(&o.im, o.cache, 0, &key, o.k.n, pool, make_bytes, &o.k) == TD_OK);
    td_image_close(&o.im);
    char image[400];
    T_EQ(files_in(o.cache, ".image.lock", o.lock, sizeof o.lock), 1);
    snprintf(image, sizeof image, "%.*s", (int)strlen(o.lock) - 5, o.lock);
    T_OK(unlink(image) == 0);
    o.k.calls = 0;
    int first = open(o.lock, O_RDWR);
    T_OK(first >= 0 && flock(first, LOCK_EX | LOCK_NB) == 0);
    pthread_create(&t, NULL, open_it, &o);
    while (openings(first) < 2) sched_yield(); /* it has the file open and waits */
    T_OK(unlink(o.lock) == 0);
    int second = open(o.lock, O_RDWR | O_CREAT, 0644);
    T_OK(second >= 0 && flock(second, LOCK_EX | LOCK_NB) == 0);
    close(first);
    while (openings(second) < 2 && !atomic_load(&o.over)) sched_yield();
    T_OK(!atomic_load(&o.over) && o.k.calls == 0, "made beside the one who holds the lock");
    close(second);
    pthread_join(t, NULL);
    T_OK(o.k.calls == 1 && bytes_good(&o.im));
    td_image_close(&o.im);
    clear_dir(o.cache);
}

static td_status open_of(td_image *im, const char *cache, uint64_t limit, uint64_t m, uint32_t shard, maker *k)
{
    td_image_key key = {{m, 0}, {3, 4}, 1, shard, 2, 0};
    return td_image_open(im, cache, limit, &key, k->n, pool, make_bytes, k);
}

/* The file of model m was opened last so many seconds ago. */
static void age(const char *cache, uint64_t m, uint32_t shard, long s)
{
    char path[400];
    struct timespec t[2] = {{.tv_sec = time(NULL) - s}, {.tv_sec = time(NULL) - s}};
    snprintf(path, sizeof path, "%s/model-%032llx-00000003-l1-s%uof2.image", cache, (unsigned long long)m, shard);
    T_OK(utimensat(AT_FDCWD, path, t, 0) == 0, "%s", path);
}

/* Which of models 1 .. 5 are there, shard 0. */
static int present(const char *cache)
{
    int n = 0;
    for (unsigned m = 1; m <= 5; m++) {
        char path[400];
        snprintf(path, sizeof path, "%s/model-%032llx-00000003-l1-s0of2.image", cache, (unsigned long long)m);
        n = 10 * n + (access(path, F_OK) == 0);
    }
    return n;
}

/* Images of 1 MiB and some, of which two and a half fit. */
static void test_image_prune(void)
{
    enum { LIMIT = 2700000, LONG = 1000000 };
    char cache[128], path[400];
    td_image a, b, c;
    maker k = {0, 1 << 20};
    snprintf(cache, sizeof cache, "%s/pruned", dir);
    for (unsigned m = 1; m <= 3; m++) { /* no limit: all stay */
        T_OK(open_of(&a, cache, 0, m, 0, &k) == TD_OK && a.shared);
        td_image_close(&a);
        age(cache, m, 0, LONG - 100 * m);
    }
    T_EQ(present(cache), 11100);
    T_OK(open_of(&a, cache, LIMIT, 1, 0, &k) == TD_OK &&
         k.calls == 3); /* the oldest, opened: now the newest, and held */
    T_EQ(present(cache), 10100);
    age(cache, 1, 0, LONG); /* in use, however old it looks */
    T_OK(open_of(&b, cache, LIMIT, 4, 0, &k) == TD_OK && b.made);
    T_EQ(present(cache), 10010);
    T_OK(open_of(&c, cache, LIMIT, 5, 0, &k) == TD_OK && c.made &&
         c.shared); /* all others are held: the limit gives way */
    T_EQ(present(cache), 10011);
    td_image_close(&a), td_image_close(&b), td_image_close(&c);
    age(cache, 4, 0, 10);
    T_OK(open_of(&a, cache, LIMIT, 5, 1, &k) == TD_OK &&
         a.made); /* another shard of 5: shard 0 stays, and so would 4, were there room */
    T_EQ(present(cache), 1);
    T_OK(bytes_good(&a));
    td_image_close(&a);
    T_EQ(files_in(cache, ".image.lock", NULL, 0), 2); /* theirs went with them */
    static const char *const lone[] = {"free", "held"}; /* locks whose images are gone otherwise */
    int held = -1;
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/model-%s.image.lock", cache, lone[i]);
        if (held >= 0) close(held);
        held = open(path, O_RDWR | O_CREAT, 0644);
    }
    T_OK(held >= 0 && flock(held, LOCK_EX | LOCK_NB) == 0); /* its image is being made */
    T_OK(open_of(&a, cache, LIMIT, 5, 1, &k) == TD_OK && !a.made);
    td_image_close(&a);
    T_EQ(files_in(cache, "free.image.lock", NULL, 0), 0);
    T_EQ(files_in(cache, "held.image.lock", NULL, 0), 1);
    close(held);
    snprintf(path, sizeof path, "%s/model-left.image.abcdef", cache); /* half made by one that died */
    FILE *f = fopen(path, "w");
    T_OK(f && fwrite(path, 1, 100, f) == 100 && fclose(f) == 0);
    snprintf(path, sizeof path, "%s/notes.txt", cache); /* not ours */
    f = fopen(path, "w");
    T_OK(f && fclose(f) == 0);
    T_OK(open_of(&a, cache, 1, 5, 0, &k) == TD_OK && !a.made);
    T_EQ(files_in(cache, "abcdef", NULL, 0), 1); /* it may be at work */
    td_image_close(&a);
    snprintf(path, sizeof path, "%s/model-left.image.abcdef", cache);
    struct timespec old[2] = {{.tv_sec = time(NULL) - 2 * 86400}, {.tv_sec = time(NULL) - 2 * 86400}};
    T_OK(utimensat(AT_FDCWD, path, old, 0) == 0);
    T_OK(open_of(&a, cache, 1, 5, 0, &k) == TD_OK && !a.made);
    T_EQ(files_in(cache, "abcdef", NULL, 0), 0);
    T_EQ(files_in(cache, "notes.txt", NULL, 0), 1);
    td_image_close(&a);
    clear_dir(cache);
}

/* What a person is told of a long load: ascending, to the end. */
typedef struct told { int calls; double last; bool ascending, named; } told;
static void tell(void *arg, const char *what, double fraction)
{
    told *t = arg;
    t->ascending = t->ascending && fraction >= t->last && fraction <= 1;
    t->named = t->named && !strcmp(what, "packing weights");
    t->last = fraction;
    t->calls++;
}

static void test_progress(const td_ops *ops)
{
    char cache[128];
    snprintf(cache, sizeof cache, "%s/told", dir);
    for (int again = 0; again < 2; again++) {
        told t = {.ascending = true, .named = true};
        td_model *m = NULL;
        td_model_opts o = {.dir = "tests/golden/models/llama-bias", .ops = ops, .pool = pool, .max_rows = 16, .max_logits = 4,
                           .cache_dir = cache, .progress = tell, .arg = &t};
        T_OK(td_model_open(&o, &m) == TD_OK, "%s", td_reason());
        bool packs = !again || !strcmp(ops->family, "ref"); /* ref keeps no image */
        T_OK(packs ? t.calls > 4 && t.last == 1 && t.ascending && t.named : t.calls == 0, "%s: %d calls, the last at %g", ops->family,
             t.calls, t.last);
        td_model_close(m);
    }
    clear_dir(cache);
}

static void test_model_image(const td_ops *ops)
{
    const char *golden = "tests/golden/models/llama-bias";
    char cache[128];
    float x[320], y[320], z[320];
    snprintf(cache, sizeof cache, "%s/cache", dir);
    td_model *a = open_model(golden, NULL, ops, NULL);
    td_model *b = open_model(golden, NULL, ops, cache);
    td_model *c = open_model(golden, NULL, ops, cache);
    if (!a || !b || !c) return;
    logits_of(a, ops, x);
    logits_of(b, ops, y);
    logits_of(c, ops, z);
    T_OK(!memcmp(x, y, sizeof x) && !memcmp(x, z, sizeof x), "%s: in memory = made = mapped", ops->family);
    T_EQ(files_in(cache, ".image", NULL, 0), strcmp(ops->family, "ref") ? 2 : 0);
    td_model_close(a);
    td_model_close(b);
    td_model_close(c);
    clear_dir(cache);
}

/* ---- steps outside the limits ---- */

typedef struct layers {
    int n;
    bool ascending;
} layers;
static void count_layer(void *arg, int layer)
{
    layers *l = arg;
    l->ascending = l->ascending && layer == l->n;
    l->n++;
}

static void bad(td_model *m, td_step *s, const ts_kv *kv, const char *reason)
{
    static float logits[16 * 320];
    layers l = {0, true};
    td_status st = td_model_forward(m, s, kv->kv, logits, count_layer, &l);
    T_OK(st == TD_EPROTO && l.n == 0 && strstr(td_reason(), reason), "%s: %s (%s)", reason,
         td_status_name(st), td_reason());
}

static void test_steps(void)
{
    td_model *m = open_model("tests/golden/models/mistral-swa", NULL, family("ref"), NULL);
    if (!m) return;
    const td_model_desc *d = td_model_descr(m);
    static const int32_t ids[16] = {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17};
    ts_kv kv;
    ts_kv_open(&kv, d, family("ref"), 8, 512, 2);
    ts_seq q[2] = {{0, 0, 3, ids}, {1, 0, 4, ids}};
    td_step *s = ts_step(&kv, d, q, 2, false);
    float logits[4 * 320];
    layers l = {0, true};
    T_OK(td_model_forward(m, s, kv.kv, logits, count_layer, &l) == TD_OK && l.n == d->L && l.ascending, "%s",
         td_reason());
    td_step keep = *s;
    td_step_seq *sq = (td_step_seq *)(void *)((char *)s + s->seqs), keep_sq[2] = {sq[0], sq[1]};
    int32_t *id = (int32_t *)(void *)((char *)s + s->ids), *pos = (int32_t *)(void *)((char *)s + s->pos);
    int32_t *page = (int32_t *)(void *)((char *)s + sq[1].pages[0]),
            *want = (int32_t *)(void *)((char *)s + s->logit_rows);
#define BAD(change, reason)                                                                                  \
    do {                                                                                                     \
        change;                                                                                              \
        bad(m, s, &kv, reason);                                                                              \
        *s = keep, sq[0] = keep_sq[0], sq[1] = keep_sq[1];                                                   \
    } while (0)
    BAD(s->bytes = 8, "too short");
    BAD(s->n_rows = 0, "rows out of range");
    BAD(s->n_rows = 17, "rows out of range");
    BAD(s->n_seqs = 0, "sequences out of range");
    BAD(s->n_seqs = 8, "sequences out of range");
    BAD(s->n_logits = 5, "logit rows out of range");
    BAD(s->n_groups = 2, "page groups");
    BAD(s->ids = s->bytes, "outside the step");
    BAD(s->pos = 0xfffffff8u, "outside the step");
    BAD(s->seqs += 4, "outside the step");
    BAD(s->logit_rows = 0, "outside the step");
    BAD(s->bytes = s->seqs + 8, "outside the step");
    BAD(s->n_seqs = 1, "rows without a sequence");
    BAD(sq[1].row0 = 2, "rows of a sequence");
    BAD(sq[1].n_rows = 5, "rows of a sequence");
    BAD(sq[1].n_rows = 0xffffffffu, "rows of a sequence");
    BAD(sq[0].n_rows = 0, "rows of a sequence");
    BAD(sq[0].pos0 = 510, "position beyond");
    BAD(sq[0].pos0 = 0xffffffffu, "position beyond");
    BAD(sq[0].n_pages[0] = 0, "page table too short");
    BAD(sq[0].pages[0] = s->bytes - 2, "page table too short");
    BAD(sq[0].pages[0] = 0xfffffff8u, "page table too short");
    BAD(sq[0].pos0 = 1, "positions are not consecutive");
    int32_t was = page[0];
    BAD(page[0] = -1, "page out of range");
    BAD(page[0] = kv.kv[0].n_pages, "page out of range");
    page[0] = was;
    BAD(id[2] = 320, "token id out of range");
    BAD(id[2] = -1, "token id out of range");
    td_sample_out before[2] = {{.token = 7}, {.token = 4}}; /* ids[2]: as sample 1 of the step before */
    BAD(id[2] = -2; s->n_before = 2, "the step before are not here");
    td_model_drawn(m, before);
    BAD(id[2] = -3; s->n_before = 2, "token id out of range");
    BAD(id[2] = INT32_MIN; s->n_before = 2, "token id out of range");
    float named[4 * 320];
    id[2] = -2, s->n_before = 2;
    T_OK(td_model_forward(m, s, kv.kv, named, NULL, NULL) == TD_OK, "%s", td_reason());
    T_OK(!memcmp(named, logits, 2 * 320 * sizeof *logits), "the token of sample 1 is not the row's");
    td_model_drawn(m, NULL);
    *s = keep;
    id[2] = 4;
    BAD(pos[6] = 9, "positions are not consecutive");
    pos[6] = 3;
    BAD(want[0] = -1, "logit rows are not ascending");
    BAD(want[0] = want[1], "logit rows are not ascending");
    BAD(want[0] = 2; want[1] = 7, "logit rows are not ascending");
    want[1] = 6;
    kv.kv[0].D = 8;
    bad(m, s, &kv, "pages of another shape");
    kv.kv[0].D = 16;
    T_OK(td_model_forward(m, s, kv.kv, logits, NULL, NULL) == TD_OK, "%s", td_reason());
    free(s);
    ts_kv_close(&kv);
    td_model_close(m);
}

/* ---- real folders ---- */

static void test_folders(void)
{
    char path[64] = "../shared/data/stories260K/config.json";
    if (access(path, R_OK)) {
        printf("SKIP: no stories260K\n");
        return;
    }
    float *x = malloc(4096 * sizeof *x);
    const td_ops *ref = family("ref");
    td_model *m = open_model("../shared/data/stories260K", NULL, ref, NULL);
    if (m) {
        T_STR(td_model_descr(m)->dtype, "f32");
        T_OK(td_model_descr(m)->D == 8 && td_model_descr(m)->tied && td_model_descr(m)->eos[0] == 2);
        logits_of(m, ref, x);
        for (int k = 0; k < 512; k++) T_OK(isfinite(x[k]));
        td_model_close(m);
    }
    /* Its head dimension of 8 is refused by name where a family does not take it. */
    td_model_opts narrow = {
        .dir = "../shared/data/stories260K", .ops = best(), .pool = pool, .max_rows = 16, .max_logits = 4};
    if (best() != ref)
        T_OK(td_model_open(&narrow, &m) == TD_ENOSUP && strstr(td_reason(), "head dimension 8"), "%s",
             td_reason());
    char cache[128];
    snprintf(cache, sizeof cache, "%s/demo", dir);
    for (int i = 0; i < 2; i++) {
        int64_t t0 = td_now_us();
        m = open_model("deploy/demo/target", NULL, best(), cache);
        int64_t us = td_now_us() - t0;
        if (!m) continue;
        if (getenv("VERBOSE"))
            printf("demo model, start %d: %.1f ms (%s)\n", i, (double)us / 1e3, best()->family);
        td_model_close(m);
    }
    clear_dir(cache);
    free(x);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    pool = td_pool_open(2);
    snprintf(dir, sizeof dir, "/tmp/td-model-%d", (int)getpid());
    mkdir(dir, 0755);
    test_checkpoints();
    test_steps();
    for (int i = 0; td_ops_family(i); i++) {
        test_dummy(td_ops_family(i));
        test_model_image(td_ops_family(i));
        test_progress(td_ops_family(i));
    }
    test_image();
    test_image_unusable();
    test_image_race();
    test_image_prune();
    test_image_lock_removed();
    test_folders();
    td_pool_close(pool);
    T_OK(rmdir(dir) == 0, "the test leaves nothing");
    return T_DONE();
}
