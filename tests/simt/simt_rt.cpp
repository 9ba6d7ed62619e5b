// SPDX-License-Identifier: Apache-2.0
/* tests/simt/simt_rt.cpp - the runtime behind simt.h: fibers, schedules, barriers, warp operations, device
 * memory, the access checks of SIMT_CHECK. Compiled without -fsanitize=thread in every mode. */
#include "tests/simt/simt_rt.h"
#include "tests/simt/simt_c.h"
#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <ctime>
#include <dlfcn.h>
#include <elf.h>
#include <functional>
#include <link.h>
#include <map>
#include <memory>
#include <pthread.h>
#include <string>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>
#include <vector>
#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_UCONTEXT) || !defined(__x86_64__)
#undef SIMT_UCONTEXT
#define SIMT_UCONTEXT 1
#include <ucontext.h>
#else
extern "C" void simt_switch(void **save, void *to);
asm(".text\n.p2align 4\n.globl simt_switch\n.type simt_switch,@function\nsimt_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp,(%rdi)\nmovq "
    "%rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size "
    "simt_switch,.-simt_switch\n");
#endif
namespace simt
{
Fiber *cur;
Options opt;
Stats stats;
static std::string g_err;
static cudaError_t g_code;
constexpr unsigned kMaxThreads = 1024;
#ifdef SIMT_ASAN
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
// ---- device memory: each allocation in its own pages, end flush (to 16) with an inaccessible page, freed
// pages stay inaccessible
struct Rec {
    uint32_t key, bep, pc;
    uint16_t wep, fl;
}; // key: 0 none, 1+block*1024+thread, ~0 host
struct Cell {
    Rec w, r[2];
};
constexpr uint16_t SPLIT = 1 << 15; // fl of a word's w
// CHECK mode only. A cell for each word of four bytes, which have seen the same accesses; one for each byte once they
// have not (SPLIT). Most accesses are of whole words: a fourth of the work, and of the memory.
struct Cells {
    Cell *word, *byte;
    size_t n;
};
struct Alloc {
    char *p;
    size_t n;
    Cells cells;
    int id;
    bool shared, freed;
    size_t map;
};
static char *g_arena;
static size_t g_arena_n = (size_t)8 << 30, g_top;
static auto &g_allocs = *new std::map<uintptr_t, Alloc *>; // freed ones too
static auto &g_live = *new std::vector<Alloc *>;           // what every launch looks at
static std::vector<uint32_t> g_page;
static auto &g_byid = *new std::vector<Alloc *>(1);
static Alloc g_tls;
static std::map<const void *, int> g_smem_attr;
static struct Block {
    pthread_t thread; // that runs it: what others do meanwhile is a host's
    void (*fn)(void *);
    void *arg;
    size_t argsz;
    const void *kernel;
    unsigned n, nw, done, waiting, bnum;
    int red[3], bline;
    const char *bfile;
    uint32_t ready[32], alive[32], wwait[32];
    unsigned bep, block_bep, launch_bep;
    bool acquired; // this block: what others released may be read
    bool running;
    Alloc *dyn;
    unsigned rng;
    bool overlaps;      // launched so that it may start before the launch before it has ended
    unsigned chain_bep; // launches from here on may still run when this one starts
} B;
struct CpOp {
    void *d;
    const void *s;
    unsigned n, sn;
    int group, line;
};
static std::vector<CpOp> g_cp[kMaxThreads];
static int g_cpgroup[kMaxThreads];
static Fiber *g_f;
static char *g_stacks, *g_stacks_end;
static Fiber g_main;
static int g_failed;
static char *g_img_lo;
static char *g_img_hi;
static bool g_fn;
static const void *at_line(int line)
{
    return (void *)((uintptr_t)1 << 63 | (unsigned)line);
} // pc stand-in where only the line is known
static std::string symbol(const void *pc)
{
    if ((uintptr_t)pc >> 63) return "line " + std::to_string((uintptr_t)pc & 0xffffff);
    Dl_info di;
    if (!pc || !dladdr(pc, &di)) return "?";
    char cmd[1024], buf[512];
    std::string r;
    const char *f = di.dli_fname;
    char self[512];
    ssize_t k = readlink("/proc/self/exe", self, sizeof self - 1);
    if (k > 0) self[k] = 0;
    if (!strchr(f, '/') || access(f, R_OK)) f = self;
    snprintf(cmd, sizeof cmd, "addr2line -Cps%s -e '%s' 0x%zx 2>/dev/null", g_fn ? "f" : "", f,
             (size_t)((char *)pc - (char *)di.dli_fbase));
    if (FILE *p = popen(cmd, "r")) {
        while (fgets(buf, sizeof buf, p)) r += buf;
        pclose(p);
    }
    while (!r.empty() && r.back() == '\n') r.pop_back();
    return r.empty() ? "?" : r;
}
static std::string kname()
{
    g_fn = true;
    std::string s = symbol(B.kernel);
    g_fn = false;
    size_t e = s.find(" at ");
    s = s.substr(0, e);
    e = s.find('(');
    return s.substr(0, e);
}
const char *last_error()
{
    return g_err.c_str();
}
void clear_error()
{
    g_err.clear();
    g_code = cudaSuccess;
}
static void set_error(cudaError_t c, const std::string &s)
{
    if (g_err.empty()) {
        g_err = s;
        g_code = c;
    }
    if (!opt.quiet) fprintf(stderr, "simt: %s\n", s.c_str());
}
static cudaError_t api_fail(cudaError_t c, const char *fmt, ...)
{
    char b[600];
    va_list v;
    va_start(v, fmt);
    vsnprintf(b, sizeof b, fmt, v);
    va_end(v);
    set_error(c, b);
    return c;
}
// ---- context switch
static void raw_switch(Fiber *from, Fiber *to)
{
    stats.switches++;
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(&from->fake, to->stack, to == &g_main ? (size_t)g_main.idx : kStack);
#endif
#ifdef SIMT_UCONTEXT
    swapcontext((ucontext_t *)from->uctx, (ucontext_t *)to->uctx);
#else
    simt_switch(&from->sp, to->sp);
#endif
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}
static void go(Fiber *to)
{
    Fiber *from = cur;
    cur = to;
    threadIdx = to->tid;
    if (from != to) raw_switch(from, to);
}
[[noreturn]] static void bail()
{
    B.running = false;
    g_failed = 1;
    Fiber *me = cur;
    cur = &g_main;
    raw_switch(me, &g_main);
    abort();
}
void fail(const char *fmt, ...)
{
    char b[1500];
    int k = snprintf(b, sizeof b, "kernel %s block (%u,%u,%u) thread (%u,%u,%u): ", kname().c_str(),
                     blockIdx.x, blockIdx.y, blockIdx.z, cur->tid.x, cur->tid.y, cur->tid.z);
    va_list v;
    va_start(v, fmt);
    vsnprintf(b + k, sizeof b - k, fmt, v);
    va_end(v);
    set_error(cudaErrorLaunchFailure, b);
    if (!B.running) abort();
    bail();
}
static void deadlock()
{
    std::map<std::string, std::pair<int, std::string>> at;
    char s[400];
    int ex = 0;
    for (unsigned i = 0; i < B.n; i++) {
        Fiber &f = g_f[i];
        if (!f.alive) {
            ex++;
            continue;
        }
        if (f.where == 3)
            snprintf(s, sizeof s, "%s %s:%d", f.what, f.file, f.line);
        else if (f.where == 1)
            snprintf(s, sizeof s, "__syncthreads %s:%d", f.file, f.line);
        else
            snprintf(s, sizeof s, "warp op with mask 0x%08x %s:%d", f.mask, f.file, f.line);
        auto &e = at[s];
        snprintf(s, sizeof s, "%d", (int)i);
        if (e.first++ < 4) e.second += (e.second.empty() ? "" : ",") + std::string(s);
    }
    std::string m;
    for (auto &e : at) {
        snprintf(s, sizeof s, "; %d waiting at ", e.second.first);
        m += s + e.first + " (threads " + e.second.second + (e.second.first > 4 ? ",..)" : ")");
    }
    fail("DEADLOCK: %d of %u threads have exited%s", ex, B.n, m.c_str());
}
// order 0/1: one warp runs as far as it can, lanes and warps ascending/descending (the most skewed
// schedules); 2: round robin over all threads; 3 and up: random, seeded.  `other`: prefer another warp
// (yield).
static Fiber *pick(bool other = false)
{
    unsigned w = cur->warp, l = cur->lane, nw = B.nw;
    uint32_t *R = B.ready;
    if (opt.order >= 3) {
        B.rng = B.rng * 1664525u + 1013904223u;
        unsigned w0 = (B.rng >> 8) & 3 && !other ? w : (B.rng >> 11) % nw, r = (B.rng >> 24) & 31;
        for (unsigned i = 0; i < nw; i++) {
            unsigned v = (w0 + i) % nw;
            uint32_t m = R[v];
            if (!m) continue;
            uint32_t q = (m >> r) | (r ? m << (32 - r) : 0);
            return g_f + v * 32 + ((__builtin_ctz(q) + r) & 31);
        }
        return nullptr;
    }
    bool rev = opt.order == 1;
    uint32_t m = rev ? R[w] & ((1u << l) - 1) : l == 31 ? 0 : R[w] & (~0u << (l + 1));
    if (!m && opt.order < 2 && !other) m = R[w];
    if (m) return g_f + w * 32 + (rev ? 31 - __builtin_clz(m) : __builtin_ctz(m));
    for (unsigned i = 1; i <= nw; i++) {
        unsigned v = rev ? (w >= i ? w - i : w + nw - i) : (w + i < nw ? w + i : w + i - nw);
        if (R[v]) return g_f + v * 32 + (rev ? 31 - __builtin_clz(R[v]) : __builtin_ctz(R[v]));
    }
    return nullptr;
}
static void next()
{
    Fiber *f = pick();
    while (!f && sm90_progress()) f = pick();
    if (!f) deadlock();
    go(f);
}
void sleep_on(const void *on, const char *what, int line, const char *file)
{
    Fiber *f = cur;
    f->on = on;
    f->what = what;
    f->line = line;
    f->file = file;
    f->where = 3;
    B.ready[f->warp] &= ~(1u << f->lane);
    next();
}
void wake(const void *on)
{
    for (unsigned i = 0; i < B.n; i++) {
        Fiber &f = g_f[i];
        if (!f.alive || f.where != 3 || f.on != on) continue;
        f.where = 0;
        B.ready[f.warp] |= 1u << f.lane;
    }
}
void yield()
{
    if (B.running && B.n > 1) {
        Fiber *f = pick(true);
        if (f) go(f);
    }
}
int block_barrier(int pred, int what, int line, const char *file)
{
    Fiber *f = cur;
    stats.barriers++;
    if (!B.waiting) {
        B.red[0] = 0;
        B.red[1] = 1;
        B.red[2] = 0;
        B.bline = line;
        B.bfile = file;
    } else if (line != B.bline) {
        fail("divergent barrier: this thread is at %s:%d while others wait at %s:%d", file, line, B.bfile,
             B.bline);
    }
    B.red[0] += pred;
    B.red[1] &= pred;
    B.red[2] |= pred;
    f->line = line;
    f->file = file;
    f->where = 1;
    if (++B.waiting == B.n - (opt.exit_ok ? B.done : 0)) {
        B.waiting = 0;
        B.bep++;
        for (unsigned w = 0; w < B.nw; w++) B.ready[w] = B.alive[w];
        for (unsigned i = 0; i < B.n; i++) {
            g_f[i].where = 0;
            g_f[i].pred = B.red[what];
        }
        if (opt.order >= 3) next();
    } else {
        B.ready[f->warp] &= ~(1u << f->lane);
        next();
    }
    return f->pred;
}
static void run_op(unsigned w, uint32_t mask);
static bool try_release(unsigned w, uint32_t mask)
{
    uint32_t need = mask & B.alive[w];
    if ((B.wwait[w] & need) != need || !need) return false;
    Fiber *L = g_f + w * 32;
    Fiber *a = L + __builtin_ctz(need);
    unsigned wep = 0;
    for (uint32_t m = need; m; m &= m - 1) {
        Fiber *f = L + __builtin_ctz(m);
        if (f->wep > wep) wep = f->wep;
        if (f->mask != mask || f->kind != a->kind || f->line != a->line)
            fail("warp op mismatch: lane %u is at %s:%d with mask 0x%08x, lane %u at %s:%d with mask 0x%08x",
                 a->lane, a->file, a->line, a->mask, f->lane, f->file, f->line, f->mask);
    }
    run_op(w, need);
    for (uint32_t m = need; m; m &= m - 1) {
        Fiber *f = L + __builtin_ctz(m);
        f->where = 0;
        if (a->kind == SYNC || a->kind == CALL) f->wep = wep + 1; // shuffles, votes, mma order no memory
    }
    B.wwait[w] &= ~need;
    B.ready[w] |= need;
    return true;
}
void warp_op(int kind, unsigned mask, int line, const char *file)
{
    Fiber *f = cur;
    uint32_t bit = 1u << f->lane;
    stats.warp_ops++;
    f->kind = kind;
    f->mask = mask;
    f->line = line;
    f->file = file;
    if (!(mask & bit))
        fail("warp op at %s:%d: lane %u is not in its own mask 0x%08x", file, line, f->lane, mask);
    f->where = 2;
    B.wwait[f->warp] |= bit;
    if (try_release(f->warp, mask)) {
        if (opt.order >= 3) next();
    } else {
        B.ready[f->warp] &= ~bit;
        next();
    }
}
void warp_call(Call *c, int line, const char *file)
{
    cur->call = c;
    warp_op(CALL, 0xffffffffu, line, file);
}
static void hook(uintptr_t a, unsigned n, bool w, int fl, const void *pc);
static void run_op(unsigned w, uint32_t need)
{
    Fiber *L = g_f + w * 32;
    int k = L[__builtin_ctz(need)].kind;
    uint32_t acc = 0;
    bool first = true;
    switch (k) {
    case SYNC:
        return;
    case SHFL:
        for (uint32_t m = need; m; m &= m - 1) {
            Fiber &f = L[__builtin_ctz(m)];
            unsigned s = f.in[2] & 31;
            if ((need >> s) & 1) {
                f.out[0] = L[s].in[0];
                f.out[1] = L[s].in[1];
            } else
                f.out[0] = f.out[1] = ~0u;
        }
        return;
    case MATCH:
        for (uint32_t m = need; m; m &= m - 1) {
            Fiber &f = L[__builtin_ctz(m)];
            f.out[0] = 0;
            for (uint32_t q = need; q; q &= q - 1)
                if (L[__builtin_ctz(q)].in[0] == f.in[0]) f.out[0] |= q & -q;
        }
        return;
    case BALLOT:
    case RADD:
    case RMIN:
    case RMAX:
    case RAND:
    case ROR:
        for (uint32_t m = need; m; m &= m - 1) {
            unsigned l = __builtin_ctz(m);
            uint32_t v = L[l].in[0];
            acc = k == BALLOT ? acc | (v << l)
                  : first     ? v
                  : k == RADD ? acc + v
                  : k == RMIN ? (v < acc ? v : acc)
                  : k == RMAX ? (v > acc ? v : acc)
                  : k == RAND ? acc & v
                              : acc | v;
            first = false;
        }
        for (uint32_t m = need; m; m &= m - 1) L[__builtin_ctz(m)].out[0] = acc;
        return;
    default:
        break;
    }
    if (need != ~0u) fail("mma/ldmatrix/wgmma/bar need all 32 lanes, active 0x%08x", need);
    if (k == CALL) {
        ((Call *)L->call)->run(L);
        return;
    }
    if (k == MMABF || k == MMAF16) { // g = lane/4, t = lane%4
        stats.mma++;
        auto up = k == MMABF ? bf2f : h2f;
        typedef double wide __attribute__((vector_size(32))); // products are exact in double, sums in one order
        double A[16][16], C[16][8];
        alignas(32) double Bk[16][8];
        for (unsigned l = 0; l < 32; l++) {
            unsigned g = l >> 2, t = l & 3;
            const uint32_t *r = L[l].in;
            for (unsigned i = 0; i < 4; i++)
                for (unsigned h = 0; h < 2; h++)
                    A[g + (i & 1) * 8][2 * t + h + (i >> 1) * 8] = up((uint16_t)(r[i] >> (16 * h)));
            for (unsigned i = 0; i < 2; i++)
                for (unsigned h = 0; h < 2; h++)
                    Bk[2 * t + h + i * 8][g] = up((uint16_t)(r[4 + i] >> (16 * h)));
            for (unsigned i = 0; i < 4; i++) C[g + (i >> 1) * 8][2 * t + (i & 1)] = bits<float>(r[6 + i]);
        }
        for (unsigned i = 0; i < 16; i++) {
            wide s[2];
            memcpy(s, C[i], sizeof s);
            for (unsigned q = 0; q < 16; q++) {
                s[0] += A[i][q] * *(const wide *)Bk[q];
                s[1] += A[i][q] * *(const wide *)(Bk[q] + 4);
            }
            if (opt.wrong & 1 && i == 3) s[1][1] += 1;
            for (unsigned j = 0; j < 8; j++)
                L[j / 2 + i % 8 * 4].out[(i >> 3) * 2 + (j & 1)] = bits<uint32_t>((float)s[j / 4][j % 4]);
        }
        return;
    }
    unsigned nm = (k == LDM1 || k == LDM1T) ? 1 : (k == LDM2 || k == LDM2T) ? 2 : 4;
    bool tr = k >= LDM1T;
    const uint16_t *row[32];
    for (unsigned l = 0; l < nm * 8; l++) {
        memcpy(&row[l], L[l].in, 8);
        Fiber *s = cur;
        cur = L + l;
        threadIdx = cur->tid;
        if ((uintptr_t)row[l] & 15) fail("ldmatrix row address not 16-byte aligned");
        hook((uintptr_t)row[l], 16, false, 0, at_line(cur->line));
        cur = s;
        threadIdx = s->tid;
    }
    for (unsigned l = 0; l < 32; l++)
        for (unsigned j = 0; j < nm; j++) {
            unsigned g = l >> 2, t = l & 3;
            L[l].out[j] = tr ? row[j * 8 + 2 * t][g] | (uint32_t)row[j * 8 + 2 * t + 1][g] << 16
                             : row[j * 8 + g][2 * t] | (uint32_t)row[j * 8 + g][2 * t + 1] << 16;
        }
}
// ---- cp.async: destination is scribbled on at issue and filled at the wait, so both missing waits and early
// overwrites show
static void fill(void *d, int v, size_t n)
{
    memset(d, v, n);
    asm volatile("" : : "r"(d) : "memory");
}
static void real_copy(const CpOp &o, bool h)
{
    memcpy(o.d, o.s, o.sn);
    memset((char *)o.d + o.sn, 0, o.n - o.sn);
    if (h) hook((uintptr_t)o.d, o.n, true, 0, at_line(o.line));
}
void cp_async(void *d, const void *s, unsigned n, unsigned sn, int line)
{
    if (((uintptr_t)d & (n - 1)) || (sn && ((uintptr_t)s & (n - 1))))
        fail("cp.async line %d: address not %u-byte aligned", line, n);
    if (sn) hook((uintptr_t)s, sn, false, 0, at_line(line));
    hook((uintptr_t)d, n, true, INFLIGHT, at_line(line));
    CpOp o{d, s, n, sn, g_cpgroup[cur->idx], line};
    if (opt.eager)
        real_copy(o, true);
    else {
        fill(d, opt.poison, n);
        g_cp[cur->idx].push_back(o);
    }
}
void cp_commit()
{
    g_cpgroup[cur->idx]++;
}
void cp_wait(int keep)
{
    auto &v = g_cp[cur->idx];
    size_t i = 0;
    int lim = g_cpgroup[cur->idx] - keep;
    for (; i < v.size() && v[i].group < lim; i++) real_copy(v[i], true);
    v.erase(v.begin(), v.begin() + i);
}
// ---- CHECK mode: every access of the kernel files arrives here
[[maybe_unused]] static Alloc *find(uintptr_t a)
{
    if (a - (uintptr_t)g_arena < g_top) {
        uint32_t id = g_page[(a - (uintptr_t)g_arena) >> 12];
        return g_byid[id];
    }
    if (a - (uintptr_t)g_tls.p < g_tls.n) return &g_tls;
    return nullptr;
}
static std::string describe(uintptr_t a)
{
    char s[300];
    Alloc *best = nullptr;
    uintptr_t bd = ~(uintptr_t)0;
    for (auto &e : g_allocs) {
        Alloc *A = e.second;
        uintptr_t lo = (uintptr_t)A->p, hi = lo + A->n, d = a < lo ? lo - a : a >= hi ? a - hi : 0;
        if (d < bd) {
            bd = d;
            best = A;
        }
    }
    if (!best || bd > (1 << 20)) {
        snprintf(s, sizeof s, "address %p, near no device allocation", (void *)a);
        return s;
    }
    long off = (long)(a - (uintptr_t)best->p);
    bool sh = best == B.dyn;
    snprintf(s, sizeof s, "byte offset %ld of %s%s of %zu bytes", off, best->freed ? "FREED " : "",
             sh ? "dynamic shared memory" : ("device allocation #" + std::to_string(best->id)).c_str(),
             best->n);
    return s;
}
[[maybe_unused]] static std::string who(const Rec &r)
{
    char s[64];
    unsigned k = r.key - 1;
    snprintf(s, sizeof s, "thread %u of block %u at ", k & 1023, k >> 10);
    return s + (r.pc >> 31 ? symbol(at_line(r.pc & 0x7fffffff))
                           : symbol(r.pc ? (char *)g_img_lo + r.pc : nullptr));
}
#ifdef SIMT_CHECK
static Cells cells_new(size_t n)
{
    const size_t words = n / 4 + 2; // an end on either side may be part of a word
    auto map = [](size_t bytes) {
        return (Cell *)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    };
    return {map(words * sizeof(Cell)), map(words * 4 * sizeof(Cell)), words};
}
static void cells_free(Cells *c)
{
    if (c->word) munmap(c->word, c->n * sizeof(Cell));
    if (c->byte) munmap(c->byte, c->n * 4 * sizeof(Cell));
    *c = Cells{};
}
// CHECK mode: of each block of a launch its last atomic on global memory: what the block had written before a barrier that
// is before it, and what that thread wrote, is released by it.
static auto &g_release = *new std::vector<Rec>;
static bool released(const Rec &r)
{
    const size_t block = (r.key - 1) >> 10;
    return block < g_release.size() && (r.bep < g_release[block].bep || r.key == g_release[block].key);
}
static bool forgotten(const Cell &c, unsigned base)
{
    return c.w.bep < base && c.r[0].bep < base && c.r[1].bep < base;
}
// cell_at, of a word that is SPLIT or has to be.
static unsigned byte_at(const Alloc *A, Cell *w, Cell *b, uintptr_t a, bool whole, Cell **cell)
{
    if (whole && A->shared && forgotten(b[0], B.block_bep) && forgotten(b[1], B.block_bep) &&
        forgotten(b[2], B.block_bep) && forgotten(b[3], B.block_bep)) {
        *w = Cell{}; // by an earlier block
        *cell = w;
        return 4;
    }
    if (!(w->w.fl & SPLIT)) {
        for (int k = 0; k < 4; k++) b[k] = *w;
        w->w.fl |= SPLIT;
    }
    *cell = b + (a & 3);
    return 1;
}
// The cell of the byte at `a`, and of how many bytes from there on (1 or 4, at most `left`).
static inline __attribute__((always_inline)) unsigned cell_at(const Alloc *A, uintptr_t a, unsigned left, Cell **cell)
{
    const size_t i = (a - ((uintptr_t)A->p & ~(uintptr_t)3)) / 4;
    Cell *const w = A->cells.word + i;
    const bool whole = !(a & 3) && left >= 4;
    if (!whole || (w->w.fl & SPLIT)) return byte_at(A, w, A->cells.byte + i * 4, a, whole, cell);
    *cell = w;
    return 4;
}
namespace
{
// One access, of one thread.
struct Access {
    const Alloc *A;
    Rec me;
    unsigned base; // what is older does not count
    bool w, early;
    int fl;
    const void *pc;
    bool clash(const Rec &r) const
    {
        if (!r.key || r.key == me.key || r.key == ~0u || r.bep < base || ((r.fl & me.fl) & ATOMIC))
            return false;
        if ((r.key - 1) >> 10 != B.bnum) return !(B.acquired && released(r));
        if (r.bep < B.bep) return false;
        const unsigned warp = ((r.key - 1) & 1023) >> 5;
        return !(warp == cur->warp && r.wep < me.wep) && r.wep >= cur->seen[warp];
    }
    const char *where() const
    {
        return A->shared ? "shared" : "global";
    }
    void on(Cell *c, uintptr_t at) const;
};
inline void Access::on(Cell *c, uintptr_t at) const
{
    if (early && c->w.key && c->w.key != ~0u && c->w.bep >= B.chain_bep && c->w.bep < B.launch_bep)
        fail("read before td_grid_wait at %s of what a launch before this one wrote: %s", symbol(pc).c_str(),
             describe(at).c_str());
    if (c->w.key == me.key && c->w.bep == me.bep && c->w.wep == me.wep && !w && !(c->w.fl & INFLIGHT)) return;
    if (clash(c->w))
        fail("RACE on %s memory (%s, byte %zu): %s at %s; no barrier since %s by %s", where(),
             w ? "write-write" : "read after write", (size_t)(at - (uintptr_t)A->p), w ? "write" : "read",
             symbol(pc).c_str(), "write", who(c->w).c_str());
    if (w) {
        for (auto &r : c->r)
            if (clash(r))
                fail("RACE on %s memory (write after read, byte %zu): write at %s; no barrier since read by %s",
                     where(), (size_t)(at - (uintptr_t)A->p), symbol(pc).c_str(), who(r).c_str());
        if (!(fl & ATOMIC)) {
            c->w = me;
            return;
        }
    }
    if (opt.uninit && (!c->w.key || (A->shared && c->w.bep < base)))
        fail("UNINITIALISED read of %s memory at %s: %s", where(), symbol(pc).c_str(),
             A == &g_tls ? "static __shared__" : describe(at).c_str());
    if ((c->w.fl & INFLIGHT) && c->w.bep >= base)
        fail((c->w.fl & ASYNC) ? "read of what a bulk copy still brings at %s"
                               : "read of cp.async data before cp.async.wait at %s",
             symbol(pc).c_str());
    if ((fl & ASYNC) && A->shared && !(c->w.fl & ASYNC) && g_f[(c->w.key - 1) & 1023].fenced <= c->w.wep)
        fail("wgmma at %s reads what was stored without fence.proxy.async: by %s", symbol(pc).c_str(),
             who(c->w).c_str());
    if (w) {
        c->w = me;
        return;
    }
    Rec *s = c->r[0].key == me.key || c->r[0].bep < base || !c->r[0].key    ? &c->r[0]
             : c->r[1].key == me.key || !c->r[1].key || c->r[1].bep < B.bep ? &c->r[1]
             : c->r[0].bep < B.bep || !clash(c->r[0])                       ? &c->r[0]
             : !clash(c->r[1])                                              ? &c->r[1]
                                                                            : nullptr;
    if (s) *s = me;
}
} // namespace
static void hook(uintptr_t a, unsigned n, bool w, int fl, const void *pc)
{
    if (!B.running || !pthread_equal(B.thread, pthread_self())) return;
    stats.hooks++;
    Alloc *A = find(a);
    if (!A) {
        if ((a >= (uintptr_t)g_stacks && a < (uintptr_t)g_stacks_end) ||
            (a >= (uintptr_t)g_img_lo && a < (uintptr_t)g_img_hi) || a - (uintptr_t)B.arg < B.argsz)
            return;
        if (a - (uintptr_t)g_arena < g_arena_n)
            fail("OUT OF BOUNDS %s at %s: %s", w ? "write" : "read", symbol(pc).c_str(), describe(a).c_str());
        Dl_info di;
        if (dladdr((void *)a, &di)) return;
        fail("kernel dereferences a host pointer %p at %s", (void *)a, symbol(pc).c_str());
    }
    if (a < (uintptr_t)A->p || a + n > (uintptr_t)A->p + A->n || A->freed ||
        (A->shared && A != &g_tls && A != B.dyn))
        fail("OUT OF BOUNDS %s of %u bytes at %s: %s", w ? "write" : "read", n, symbol(pc).c_str(),
             describe(a + n > (uintptr_t)A->p + A->n ? a + n - 1 : a).c_str());
    const Rec me{1 + B.bnum * 1024 + cur->idx, B.bep,
                 (uintptr_t)pc >> 63 ? 0x80000000u | (uint32_t)(uintptr_t)pc
                 : pc                ? (uint32_t)((char *)pc - g_img_lo)
                                     : 0,
                 (uint16_t)cur->wep, (uint16_t)fl};
    const Access x{A,  me, A->shared ? B.block_bep : B.launch_bep, w, B.overlaps && !cur->waited && !A->shared,
                   fl, pc};
    if (x.early && w) fail("write of global memory before td_grid_wait at %s", symbol(pc).c_str());
    for (unsigned i = 0; i < n;) {
        Cell *c;
        const unsigned step = cell_at(A, a + i, n - i, &c);
        x.on(c, a + i);
        i += step;
    }
}
#else
static void hook(uintptr_t, unsigned, bool, int, const void *) {}
#endif
void hook_atomic(const void *p, unsigned n, void *pc)
{
    if ((uintptr_t)p & (n - 1)) fail("misaligned atomic");
    hook((uintptr_t)p, n, true, ATOMIC, pc);
#ifdef SIMT_CHECK
    const Alloc *A = B.running ? find((uintptr_t)p) : nullptr;
    if (!A || A->shared) return;
    if (g_release.size() <= B.bnum) g_release.resize(B.bnum + 1);
    g_release[B.bnum] = Rec{1 + B.bnum * 1024 + cur->idx, B.bep, 0, 0, 0};
#endif
}
void touch(const void *p, unsigned n, bool write, int flags, int line)
{
    hook((uintptr_t)p, n, write, flags, at_line(line));
}
void poison(void *p, unsigned n)
{
    fill(p, opt.poison, n);
}
Fiber *fibers()
{
    return g_f;
}
unsigned block_threads()
{
    return B.n;
}
char *dynamic_shared(size_t *bytes)
{
    *bytes = B.dyn ? B.dyn->n : 0;
    return B.dyn ? B.dyn->p : nullptr;
}
void grid_wait()
{
    cur->waited = 1;
}
void acquire_all()
{
    B.acquired = true;
}
// ---- allocator
static void arena_init()
{
    if (g_arena) return;
    g_arena = (char *)mmap(nullptr, g_arena_n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (g_arena == MAP_FAILED) {
        perror("simt arena");
        abort();
    }
}
static Alloc *new_alloc(size_t n, bool shared)
{
    arena_init();
    size_t r = (n + 15) & ~(size_t)15, pages = ((r ? r : 16) + 4095) >> 12;
    if (g_top + (pages + 2) * 4096 > g_arena_n) return nullptr;
    char *base = g_arena + g_top + 4096;
    mprotect(base, pages * 4096, PROT_READ | PROT_WRITE);
    Alloc *A =
        new Alloc{base + pages * 4096 - r, n, {}, (int)g_byid.size(), shared, false, pages * 4096};
    g_byid.push_back(A);
    g_page.resize((g_top >> 12) + pages + 2);
    for (size_t i = 0; i < pages; i++) g_page[(g_top >> 12) + 1 + i] = A->id;
    g_top += (pages + 1) * 4096;
    memset(base, 0xA5, pages * 4096);
    memset(A->p, opt.poison, n);
    g_allocs[(uintptr_t)A->p] = A;
    g_live.push_back(A);
#ifdef SIMT_CHECK
    A->cells = cells_new(n);
#endif
#ifdef SIMT_ASAN
    ASAN_POISON_MEMORY_REGION(base, pages * 4096);
    ASAN_UNPOISON_MEMORY_REGION(A->p, n);
#endif
    return A;
}
__attribute__((no_sanitize("address"))) static bool canary_ok(const Alloc *A)
{
    uintptr_t b = ((uintptr_t)A->p) & ~(uintptr_t)4095;
    for (const volatile unsigned char *q = (unsigned char *)b; q < (unsigned char *)A->p; q++)
        if (*q != 0xA5) return false;
    for (const volatile unsigned char *q = (unsigned char *)A->p + A->n; (uintptr_t)q & 15; q++)
        if (*q != 0xA5) return false;
    return true;
}
static Alloc *owner(const void *p)
{
    auto it = g_allocs.upper_bound((uintptr_t)p);
    if (it == g_allocs.begin()) return nullptr;
    --it;
    Alloc *A = it->second;
    return (char *)p >= A->p && (char *)p < A->p + A->map ? A : nullptr;
}
bool in_device_memory(const void *p, size_t n)
{
    const Alloc *A = owner(p);
    return A && !A->freed && !A->shared && (const char *)p + n <= A->p + A->n;
}
// ---- option "hide": the host cannot touch device memory, except inside a launch or a copy
static void protect(const Alloc *A, int how)
{
    if (!A->shared) mprotect((void *)((uintptr_t)A->p & ~(uintptr_t)4095), A->map, how);
}
static void protect_all(int how)
{
    for (Alloc *A : g_live) protect(A, how);
}
struct Shown {
    Shown()
    {
        if (opt.hide) protect_all(PROT_READ | PROT_WRITE);
    }
    ~Shown()
    {
        if (opt.hide) protect_all(PROT_NONE);
    }
};
// ---- signals: guard pages and runaway kernels
static void on_signal(int sig, siginfo_t *si, void *)
{
    if (!B.running) {
        signal(sig, SIG_DFL);
        raise(sig);
        return;
    }
    sigset_t s;
    sigemptyset(&s);
    sigaddset(&s, sig);
    sigprocmask(SIG_UNBLOCK, &s, nullptr);
    if (sig == SIGALRM)
        fail("TIMEOUT after %d s: still running (spinning on a value another thread or block must write?)",
             opt.timeout);
    uintptr_t a = (uintptr_t)si->si_addr;
    if (a - (uintptr_t)g_stacks < (uintptr_t)(g_stacks_end - g_stacks))
        fail("stack overflow of the fiber (%zu KiB)", kStack >> 10);
    if (!a) fail("general protection fault: misaligned vector access, or a wild or null pointer");
    fail("OUT OF BOUNDS (guard page): %s", describe(a).c_str());
}
static void exit_thread()
{
    Fiber *f = cur;
    unsigned w = f->warp;
    f->alive = 0;
    B.alive[w] &= ~(1u << f->lane);
    B.ready[w] &= B.alive[w];
    B.done++;
    if (!g_cp[f->idx].empty()) fail("thread exits with cp.async copies not waited for");
    sm90_thread_end();
    if (B.overlaps && !f->waited)
        fail("thread ends without td_grid_wait in a launch that overlaps the one before");
    for (uint32_t m = B.wwait[w]; m; m &= m - 1) {
        uint32_t q = g_f[w * 32 + __builtin_ctz(m)].mask;
        if (try_release(w, q)) break;
    }
    if (opt.exit_ok && B.waiting && B.waiting == B.n - B.done) {
        B.waiting = 0;
        B.bep++;
        for (unsigned i = 0; i < B.nw; i++) B.ready[i] = B.alive[i];
        for (unsigned i = 0; i < B.n; i++) g_f[i].pred = B.red[0];
    }
    if (B.done == B.n) {
        sm90_block_end();
        go(&g_main);
    } else
        next();
}
static void fiber_main()
{
#ifdef SIMT_ASAN
    const void *b;
    size_t n;
    __sanitizer_finish_switch_fiber(nullptr, &b, &n);
    if (!g_main.stack) {
        g_main.stack = (char *)b;
        g_main.idx = (unsigned)n;
    }
#endif
    for (;;) {
        B.fn(B.arg);
        exit_thread();
    }
}
static void make_fiber(Fiber &f)
{
#ifdef SIMT_UCONTEXT
    if (!f.uctx) f.uctx = calloc(1, sizeof(ucontext_t));
    ucontext_t *u = (ucontext_t *)f.uctx;
    getcontext(u);
    u->uc_stack.ss_sp = f.stack;
    u->uc_stack.ss_size = kStack;
    u->uc_link = nullptr;
    makecontext(u, fiber_main, 0);
#else
    size_t colour =
        (size_t)((&f - g_f) % 31) * 128; // stack tops 4096 apart would all fall into one cache set
    void **sp = (void **)(f.stack + kStack - colour) - 8;
    memset(sp, 0, 64);
    sp[6] = (void *)fiber_main;
    f.sp = sp;
#endif
#ifdef SIMT_ASAN
    ASAN_UNPOISON_MEMORY_REGION(f.stack, kStack);
    f.fake = nullptr;
#endif
}
static int find_image(struct dl_phdr_info *i, size_t, void *fn)
{
    uintptr_t lo = ~(uintptr_t)0, hi = 0;
    size_t tn = 0, tf = 0;
    for (int k = 0; k < i->dlpi_phnum; k++) {
        auto &p = i->dlpi_phdr[k];
        if (p.p_type == PT_LOAD) {
            if (i->dlpi_addr + p.p_vaddr < lo) lo = i->dlpi_addr + p.p_vaddr;
            if (i->dlpi_addr + p.p_vaddr + p.p_memsz > hi) hi = i->dlpi_addr + p.p_vaddr + p.p_memsz;
        }
        if (p.p_type == PT_TLS) {
            tn = p.p_memsz;
            tf = p.p_filesz;
        }
    }
    if ((uintptr_t)fn < lo || (uintptr_t)fn >= hi) return 0;
    g_img_lo = (char *)lo;
    g_img_hi = (char *)hi;
#ifndef SIMT_ASAN
    char *t = (char *)i->dlpi_tls_data;
    char *p = t ? t + tf : nullptr;
    size_t n = t ? tn - tf : 0;
    if (p != g_tls.p || n != g_tls.n) {
#ifdef SIMT_CHECK
        Cells old = g_tls.cells;
#endif
        g_tls = Alloc{p, n, {}, 0, true, false, n};
#ifdef SIMT_CHECK
        cells_free(&old);
        if (n) g_tls.cells = cells_new(n);
#endif
    }
#else
    (void)tn;
    (void)tf;
#endif
    return 1;
}
void *dyn_smem()
{
    if (!B.dyn) fail("dynamic shared memory used but launched with 0 bytes");
    return B.dyn->p;
}
static void setup()
{
    size_t fs = (sizeof(Fiber) * kMaxThreads + 4095) & ~(size_t)4095, st = kStack + 4096;
    g_stacks = (char *)mmap(nullptr, fs + st * kMaxThreads, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    g_stacks_end = g_stacks + fs + st * kMaxThreads;
    g_f = (Fiber *)g_stacks;
    for (unsigned i = 0; i < kMaxThreads; i++) {
        char *s = g_stacks + fs + st * i;
        mprotect(s, 4096, PROT_NONE);
        g_f[i].stack = s + 4096;
        make_fiber(g_f[i]);
    }
#ifdef SIMT_UCONTEXT
    g_main.uctx = calloc(1, sizeof(ucontext_t));
#endif
    B.bep = 1;
#define SIMT_ENV(k, v)                                                                                       \
    if (getenv(k)) opt.v = atoi(getenv(k));
    SIMT_ENV("SIMT_ORDER", order)
    SIMT_ENV("SIMT_POISON", poison) SIMT_ENV("SIMT_TIMEOUT", timeout) SIMT_ENV("SIMT_EXIT_OK", exit_ok)
        SIMT_ENV("SIMT_UNINIT", uninit) SIMT_ENV("SIMT_EAGER", eager)
            SIMT_ENV("SIMT_FAIL_AFTER", fail_after) static char alt[65536];
    stack_t ss{};
    ss.ss_sp = alt;
    ss.ss_size = sizeof alt;
    sigaltstack(&ss, nullptr);
    struct sigaction sa {
    };
    sa.sa_sigaction = on_signal;
    sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGALRM, &sa, nullptr);
#ifndef SIMT_ASAN
    sigaction(SIGSEGV, &sa, nullptr);
    sigaction(SIGBUS, &sa, nullptr);
#endif
}
static int check_launch(dim3 g, dim3 b, size_t smem, const void *kernel)
{
    uint64_t n = (uint64_t)b.x * b.y * b.z;
    auto at = g_smem_attr.find(kernel);
    size_t lim = at == g_smem_attr.end() ? 49152 : at->second;
    B.kernel = kernel;
    if (!n || n > kMaxThreads || b.z > 64 || !g.x || !g.y || !g.z || g.y > 65535 || g.z > 65535)
        return api_fail(cudaErrorInvalidConfiguration,
                        "launch of %s: grid (%u,%u,%u) block (%u,%u,%u) invalid", kname().c_str(), g.x, g.y,
                        g.z, b.x, b.y, b.z);
    if (smem > lim)
        return api_fail(cudaErrorInvalidValue,
                        "launch of %s: %zu bytes of dynamic shared memory, limit %zu (cudaFuncSetAttribute?)",
                        kname().c_str(), smem, lim);
    return 0;
}
static bool g_chain_cut; // a copy, or the border of a graph: what follows starts after all before it
static int launch_raw(dim3 g, dim3 b, size_t smem, void (*fn)(void *), void *arg, size_t argsz,
                      const void *kernel, bool overlaps)
{
    if (!g_f) setup();
    if (int e = check_launch(g, b, smem, kernel)) return e;
    if (opt.fail_after > 0 && !--opt.fail_after)
        return api_fail(cudaErrorLaunchFailure, "launch of %s: planted", kname().c_str());
    uint64_t n = (uint64_t)b.x * b.y * b.z;
    dl_iterate_phdr(find_image, (void *)kernel);
    static std::map<size_t, Alloc *> dyns;
    B.dyn = nullptr;
    if (smem) {
        Alloc *&d = dyns[smem];
        if (!d) d = new_alloc(smem, true);
        B.dyn = d;
    }
    B.fn = fn;
    B.arg = arg;
    B.argsz = argsz;
    B.n = (unsigned)n;
    B.nw = (B.n + 31) / 32;
    gridDim = g;
    blockDim = b;
    stats.launches++;
    B.launch_bep = ++B.bep;
#ifdef SIMT_CHECK
    g_release.clear();
#endif
    B.overlaps = overlaps;
    if (!overlaps || g_chain_cut) B.chain_bep = B.launch_bep;
    g_chain_cut = false;
    g_failed = 0;
    Shown shown;
    B.rng = 12345u * (unsigned)opt.order + 1;
    if (opt.timeout) alarm((unsigned)opt.timeout);
    uint64_t nb = (uint64_t)g.x * g.y * g.z;
    for (uint64_t q = 0; q < nb && !g_failed; q++) {
        uint64_t k = opt.order & 1 ? nb - 1 - q : q;
        B.bnum = (unsigned)k;
        B.block_bep = ++B.bep;
        B.acquired = false;
        stats.blocks++;
        stats.threads += n;
        blockIdx = {(unsigned)(k % g.x), (unsigned)(k / g.x % g.y), (unsigned)(k / g.x / g.y)};
        if (g_tls.n) fill(g_tls.p, opt.poison, g_tls.n);
        if (B.dyn) memset(B.dyn->p, opt.poison, B.dyn->n);
        B.done = B.waiting = 0;
        for (unsigned w = 0; w < B.nw; w++) {
            unsigned m = B.n - w * 32;
            B.ready[w] = B.alive[w] = m >= 32 ? ~0u : (1u << m) - 1;
            B.wwait[w] = 0;
        }
        for (unsigned i = 0; i < B.n; i++) {
            Fiber &f = g_f[i];
            f.tid = {i % b.x, i / b.x % b.y, i / b.x / b.y};
            f.idx = i;
            f.lane = i & 31;
            f.warp = i >> 5;
            f.alive = 1;
            f.where = 0;
            f.wep = 0;
            f.waited = 0;
            memset(f.seen, 0, sizeof f.seen);
            f.fenced = 0;
            g_cpgroup[i] = 0;
        }
        sm90_block_begin();
        cur = &g_main;
        g_main.warp = 0;
        g_main.lane = opt.order == 1 ? 0 : 31;
        B.thread = pthread_self();
        B.running = true;
        go(pick());
        B.running = false;
        cur = &g_main;
        if (B.dyn && !g_failed && !canary_ok(B.dyn)) {
            cur = g_f;
            set_error(cudaErrorLaunchFailure,
                      "kernel " + kname() + ": red zone next to dynamic shared memory overwritten");
            g_failed = 1;
        }
    }
    if (opt.timeout) alarm(0);
    if (g_failed) {
        for (unsigned i = 0; i < kMaxThreads; i++) {
            make_fiber(g_f[i]);
            g_cp[i].clear();
        }
        return cudaErrorLaunchFailure;
    }
    for (Alloc *A : g_live)
        if (!canary_ok(A))
            return api_fail(cudaErrorLaunchFailure,
                            "kernel %s: red zone of device allocation #%d (%zu bytes) overwritten",
                            kname().c_str(), A->id, A->n);
    return 0;
}
// ---- recorded streams
static simt_stream *g_recorded; // one at a time
static pthread_t g_recorder;     // other threads may do what they like, on other streams
static bool g_broken;           // ... and something was asked of it that a device refuses
} // namespace simt
struct simt_graph {
    std::vector<std::function<int()>> nodes;
};
struct simt_stream {
    simt_graph *graph;
    int device;
};
// Not thread_local: all of that is poisoned before each block.
static pthread_key_t g_device_key;
static const int g_device_made = pthread_key_create(&g_device_key, nullptr);
cudaError_t cudaSetDevice(int d)
{
    if (d < 0 || d >= simt::opt.devices) return cudaErrorInvalidDevice;
    pthread_setspecific(g_device_key, (void *)(intptr_t)d);
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *d)
{
    (void)g_device_made;
    *d = (int)(intptr_t)pthread_getspecific(g_device_key);
    return cudaSuccess;
}
int simt_device_of(cudaStream_t s)
{
    int current;
    cudaGetDevice(&current);
    return s ? s->device : current;
}
namespace simt
{
/* There is one emulated device and one set of fibers: threads that use them come one after another. Recursive, because a
 * recording's launch runs what the others run. */
static pthread_mutex_t g_turn;
static const bool g_turn_made = [] {
    pthread_mutexattr_t a;
    pthread_mutexattr_init(&a);
    pthread_mutexattr_settype(&a, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&g_turn, &a);
    pthread_mutexattr_destroy(&a);
    return true;
}();
struct Turn {
    Turn()
    {
        (void)g_turn_made;
        pthread_mutex_lock(&g_turn);
    }
    ~Turn()
    {
        pthread_mutex_unlock(&g_turn);
    }
};
static bool overlaps_of(const cudaLaunchConfig_t *c)
{
    for (unsigned i = 0; i < c->numAttrs; i++)
        if (c->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
            return c->attrs[i].val.programmaticStreamSerializationAllowed != 0;
    return false;
}
int launch(const cudaLaunchConfig_t *c, void (*fn)(void *), void *arg, size_t argsz, const void *kernel)
{
    Turn turn;
    const dim3 g = c->gridDim, b = c->blockDim;
    const size_t smem = c->dynamicSmemBytes;
    const bool overlaps = overlaps_of(c);
    int current;
    cudaGetDevice(&current);
    if (simt_device_of(c->stream) != current)
        return api_fail(cudaErrorInvalidResourceHandle, "launch on a stream of device %d while %d is current",
                        simt_device_of(c->stream), current);
    if (g_recorded && !c->stream) {
        g_broken = true;
        return api_fail(cudaErrorStreamCaptureImplicit,
                        "launch on the default stream while a stream is recorded");
    }
    if (!g_recorded || c->stream != g_recorded)
        return launch_raw(g, b, smem, fn, arg, argsz, kernel, overlaps);
    if (int e = check_launch(g, b, smem, kernel)) return e;
    auto bytes = std::make_shared<std::vector<std::max_align_t>>(argsz / sizeof(std::max_align_t) + 1);
    memcpy((void *)bytes->data(), arg, argsz);
    g_recorded->graph->nodes.push_back(
        [=] { return launch_raw(g, b, smem, fn, (void *)bytes->data(), argsz, kernel, overlaps); });
    return 0;
}
#ifdef SIMT_CHECK
static void host_written(const void *p, size_t n)
{
    const Alloc *A = owner(p);
    for (size_t i = 0; A && i < n;) {
        const uintptr_t a = (uintptr_t)p + i, word = (a - ((uintptr_t)A->p & ~(uintptr_t)3)) / 4;
        if (!(a & 3) && n - i >= 4) A->cells.word[word] = Cell{};
        Cell *c;
        i += cell_at(A, a, n - i < 4 ? 1 : 4, &c);
        *c = Cell{Rec{~0u, 0, 0, 0, 0}, {}};
    }
}
#endif
} // namespace simt
cudaError_t simt_refused_while_recorded(const char *what)
{
    if (!simt::g_recorded || !pthread_equal(pthread_self(), simt::g_recorder)) return cudaSuccess;
    simt::g_broken = true;
    if (!simt::opt.quiet) fprintf(stderr, "simt: %s while a stream is recorded\n", what);
    return cudaErrorStreamCaptureUnsupported; // not sticky: it is the recording that is lost
}
static size_t simt_live;
/* Once, at the first question: before the first launch, which is when the other variables are read. */
static bool simt_of_env(const char *name, int *option)
{
    const char *v = getenv(name);
    if (v) *option = atoi(v);
    return v != nullptr;
}
void simt_device_of_env()
{
    static const bool told = simt_of_env("SIMT_ARCH", &simt::opt.arch);
    (void)told;
}
static size_t simt_memory()
{
    static const bool told = simt_of_env("SIMT_MEMORY", &simt::opt.memory);
    (void)told;
    return (size_t)simt::opt.memory << 20;
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *total)
{
    *total = simt_memory();
    *left = *total > simt_live ? *total - simt_live : 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *n)
{
    static const bool told = simt_of_env("SIMT_DEVICES", &simt::opt.devices);
    (void)told;
    const int have = simt::opt.devices;
    *n = have > 0 ? have : 0;
    return have > 0 ? cudaSuccess : have ? cudaErrorInsufficientDriver : cudaErrorNoDevice;
}
cudaError_t simt_malloc(void **p, size_t n)
{
    static const bool told = simt_of_env("SIMT_HIDE", &simt::opt.hide);
    (void)told;
    simt::Turn turn;
    if (auto e = simt_refused_while_recorded("cudaMalloc")) return e;
    if (simt_live + n > simt_memory()) return cudaErrorMemoryAllocation;
    auto *A = simt::new_alloc(n, false);
    if (!A) return cudaErrorMemoryAllocation;
    simt_live += n;
    if (simt::opt.hide) simt::protect(A, PROT_NONE);
    *p = A->p;
    return cudaSuccess;
}
cudaError_t cudaFree(void *p)
{
    simt::Turn turn;
    if (!p) return cudaSuccess;
    if (auto e = simt_refused_while_recorded("cudaFree")) return e;
    auto it = simt::g_allocs.find((uintptr_t)p);
    if (it == simt::g_allocs.end() || it->second->freed)
        return simt::api_fail(cudaErrorInvalidValue, "cudaFree(%p): not a live allocation", p);
    simt::Alloc *A = it->second;
    A->freed = true;
    simt::g_live.erase(std::find(simt::g_live.begin(), simt::g_live.end(), A));
    simt_live -= A->n;
    char *b = (char *)((uintptr_t)A->p & ~(uintptr_t)4095);
    madvise(b, A->map, MADV_DONTNEED);
    mprotect(b, A->map, PROT_NONE);
#ifdef SIMT_CHECK
    simt::cells_free(&A->cells);
#endif
    return cudaSuccess;
}
static cudaError_t simt_range(const void *p, size_t n, const char *what)
{
    simt::Alloc *A = simt::owner(p);
    if (!A || A->freed)
        return simt::api_fail(cudaErrorInvalidValue, "%s: %p is not in a live device allocation", what, p);
    if ((const char *)p + n > A->p + A->n)
        return simt::api_fail(cudaErrorInvalidValue,
                              "%s of %zu bytes runs past device allocation #%d of %zu bytes", what, n, A->id,
                              A->n);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *d, int v, size_t n)
{
    simt::Turn turn;
    if (!n) return cudaSuccess;
    if (auto e = simt_range(d, n, "cudaMemset")) return e;
    simt::g_chain_cut = true;
    simt::Shown shown;
    memset(d, v, n);
#ifdef SIMT_CHECK
    simt::host_written(d, n);
#endif
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, cudaMemcpyKind k)
{
    simt::Turn turn;
    if (!n) return cudaSuccess;
    if (k == cudaMemcpyHostToDevice || k == cudaMemcpyDeviceToDevice)
        if (auto e = simt_range(d, n, "cudaMemcpy to device")) return e;
    if (k == cudaMemcpyDeviceToHost || k == cudaMemcpyDeviceToDevice)
        if (auto e = simt_range(s, n, "cudaMemcpy from device")) return e;
    if (k == cudaMemcpyHostToDevice && simt::owner(s))
        return simt::api_fail(cudaErrorInvalidValue, "cudaMemcpyHostToDevice: source is a device pointer");
    simt::Shown shown;
    simt::g_chain_cut = true;
#ifdef SIMT_CHECK
    if (k == cudaMemcpyDeviceToHost) {
        simt::Alloc *A = simt::owner(s);
        size_t bad = 0, at = 0;
        for (size_t i = 0; i < n;) {
            simt::Cell *c;
            const unsigned step = simt::cell_at(A, (uintptr_t)s + i, n - i < 4 ? 1 : 4, &c);
            if (!c->w.key && !bad) at = i;
            if (!c->w.key) bad += step;
            i += step;
        }
        if (bad) {
            memcpy(d, s, n);
            return simt::api_fail(cudaErrorInvalidValue,
                                  "cudaMemcpy from device: %zu of %zu bytes of allocation #%d were never "
                                  "written, first at offset %zu",
                                  bad, n, A->id, at);
        }
    }
    if (k == cudaMemcpyHostToDevice || k == cudaMemcpyDeviceToDevice) simt::host_written(d, n);
#endif
    memcpy(d, s, n);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, cudaMemcpyKind k, cudaStream_t stream)
{
    simt::Turn turn;
    if (!simt::g_recorded || stream != simt::g_recorded) return cudaMemcpy(d, s, n, k);
    stream->graph->nodes.push_back([=] { return (int)cudaMemcpy(d, s, n, k); });
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t stream)
{
    simt::Turn turn;
    if (!simt::g_recorded || stream != simt::g_recorded) return cudaMemset(d, v, n);
    stream->graph->nodes.push_back([=] { return (int)cudaMemset(d, v, n); });
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s)
{
    int device;
    cudaGetDevice(&device);
    *s = new simt_stream{nullptr, device};
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode)
{
    simt::Turn turn;
    if (!s || simt::g_recorded) return cudaErrorStreamCaptureUnsupported;
    s->graph = new simt_graph;
    simt::g_recorded = s;
    simt::g_recorder = pthread_self();
    simt::g_broken = false;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g)
{
    simt::Turn turn;
    *g = nullptr;
    if (!s || simt::g_recorded != s) return cudaErrorInvalidValue;
    simt::g_recorded = nullptr;
    if (simt::g_broken)
        delete s->graph;
    else
        *g = s->graph;
    s->graph = nullptr;
    return *g ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long)
{
    *e = new simt_graph(*g);
    return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t)
{
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t)
{
    simt::Turn turn;
    if (auto x = simt_refused_while_recorded("cudaGraphLaunch")) return x;
    simt::g_chain_cut = true;
    for (auto &n : e->nodes)
        if (int x = n()) return (cudaError_t)x;
    simt::g_chain_cut = true;
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *, size_t *n)
{
    *n = g->nodes.size();
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g)
{
    delete g;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e)
{
    delete e;
    return cudaSuccess;
}
cudaError_t cudaPeekAtLastError()
{
    return simt::g_code;
}
cudaError_t cudaGetLastError()
{
    auto c = simt::g_code;
    simt::g_code = cudaSuccess;
    return c;
}
const char *cudaGetErrorString(cudaError_t e)
{
    if (e == cudaErrorStreamCaptureUnsupported) return "not permitted while a stream is recorded";
    if (e == cudaErrorStreamCaptureInvalidated) return "the recording was lost";
    if (e == cudaErrorNoDevice) return "no CUDA-capable device is detected";
    if (e == cudaErrorInsufficientDriver) return "CUDA driver version is insufficient for CUDA runtime version";
    return e == cudaSuccess ? "no error" : simt::g_err.empty() ? "CUDA error" : simt::g_err.c_str();
}
cudaError_t simt_set_smem(const void *fn, int v)
{
    simt::Turn turn;
    if (v < 0 || v > simt::opt.shared * 1024) return cudaErrorInvalidValue;
    simt::g_smem_attr[fn] = v;
    return cudaSuccess;
}
double simt_now()
{
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
#ifdef SIMT_CHECK
namespace simt
{
static void aligned(void *p, unsigned n, const void *pc)
{
    if (((uintptr_t)p & (n - 1)) && B.running && pthread_equal(B.thread, pthread_self()))
        fail("MISALIGNED %u-byte access at %s (address %p)", n, symbol(pc).c_str(), p);
}
} // namespace simt
#define SIMT_HK(n)                                                                                           \
    extern "C" void __tsan_read##n(void *p)                                                                  \
    {                                                                                                        \
        simt::aligned(p, n, __builtin_return_address(0));                                                    \
        simt::hook((uintptr_t)p, n, false, 0, __builtin_return_address(0));                                  \
    }                                                                                                        \
    extern "C" void __tsan_write##n(void *p)                                                                 \
    {                                                                                                        \
        simt::aligned(p, n, __builtin_return_address(0));                                                    \
        simt::hook((uintptr_t)p, n, true, 0, __builtin_return_address(0));                                   \
    }                                                                                                        \
    extern "C" void __tsan_unaligned_read##n(void *p)                                                        \
    {                                                                                                        \
        simt::hook((uintptr_t)p, n, false, 0, __builtin_return_address(0));                                  \
    }                                                                                                        \
    extern "C" void __tsan_unaligned_write##n(void *p)                                                       \
    {                                                                                                        \
        simt::hook((uintptr_t)p, n, true, 0, __builtin_return_address(0));                                   \
    }                                                                                                        \
    extern "C" void __tsan_volatile_read##n(void *p)                                                         \
    {                                                                                                        \
        simt::hook((uintptr_t)p, n, false, 0, __builtin_return_address(0));                                  \
    }                                                                                                        \
    extern "C" void __tsan_volatile_write##n(void *p)                                                        \
    {                                                                                                        \
        simt::hook((uintptr_t)p, n, true, 0, __builtin_return_address(0));                                   \
    }                                                                                                        \
    extern "C" void __tsan_read_write##n(void *p)                                                            \
    {                                                                                                        \
        simt::hook((uintptr_t)p, n, false, 0, __builtin_return_address(0));                                  \
        simt::hook((uintptr_t)p, n, true, 0, __builtin_return_address(0));                                   \
    }
SIMT_HK(1)
SIMT_HK(2) SIMT_HK(4) SIMT_HK(8) SIMT_HK(16) extern "C" void __tsan_read_range(void *p, unsigned long n)
{
    simt::hook((uintptr_t)p, (unsigned)n, false, 0, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void *p, unsigned long n)
{
    simt::hook((uintptr_t)p, (unsigned)n, true, 0, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void **, void *) {}
extern "C" void __tsan_vptr_read(void **) {}
#endif

const char *simt_last_error(void)
{
    return simt::last_error();
}
void simt_clear_error(void)
{
    simt::clear_error();
    simt::g_code = cudaSuccess;
}
void simt_quiet(int on)
{
    simt::opt.quiet = on;
}
int simt_checks(void)
{
#ifdef SIMT_CHECK
    return 1;
#else
    return 0;
#endif
}
int simt_set_option(const char *name, int value)
{
    const struct {
        const char *n;
        int *v;
    } all[] = {{"order", &simt::opt.order},
               {"poison", &simt::opt.poison},
               {"timeout", &simt::opt.timeout},
               {"eager", &simt::opt.eager},
               {"hide", &simt::opt.hide},
               {"devices", &simt::opt.devices},
               {"memory", &simt::opt.memory},
               {"arch", &simt::opt.arch},
               {"wrong", &simt::opt.wrong},
               {"shared", &simt::opt.shared},
               {"plant", &simt::opt.plant},
               {"fail_after", &simt::opt.fail_after}};
    for (auto &o : all)
        if (!strcmp(o.n, name)) {
            int old = *o.v;
            *o.v = value;
            if (o.v == &simt::opt.hide) simt::protect_all(value ? PROT_NONE : PROT_READ | PROT_WRITE);
            return old;
        }
    return -1;
}
