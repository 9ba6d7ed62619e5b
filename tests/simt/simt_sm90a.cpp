// SPDX-License-Identifier: Apache-2.0
/* tests/simt/simt_sm90a.cpp - the runtime behind simt_sm90a.h. Sections are those of the PTX ISA 9.0; tensor
 * maps: the CUDA driver API, "Tensor Map Object Management". */
#include "tests/simt/simt_c.h"
#include "tests/simt/simt_rt.h"
#include <algorithm>
#include <map>
#include <vector>

namespace simt
{
// ---- order (simt_rt.h): a barrier passes on what those who arrive know
struct Clock {
    uint32_t seen[32] = {};
};
static void raise(uint32_t &a, uint32_t b)
{
    a = std::max(a, b);
}
static void release(Clock &c)
{
    for (int w = 0; w < 32; w++) raise(c.seen[w], cur->seen[w]);
    raise(c.seen[cur->warp], cur->wep);
}
static void join(uint32_t *to, const Clock &c)
{
    for (int w = 0; w < 32; w++) raise(to[w], c.seen[w]);
}
static bool planted(simt_plant p)
{
    return opt.plant == p;
}

// ---- shared memory addresses. The window's start is a multiple of 128, as TD_DYN_SMEM promises, and of no
// more.
constexpr uint32_t kWindow = 0x480;
uint32_t smem_u32(const void *p)
{
    size_t n;
    const char *base = dynamic_shared(&n);
    if ((const char *)p < base || (const char *)p > base + n)
        fail("address %p is not in dynamic shared memory", p);
    return kWindow + (uint32_t)((const char *)p - base);
}
static char *smem_at(uint32_t a, unsigned n, const char *what, int line)
{
    size_t size;
    char *base = dynamic_shared(&size);
    if (a < kWindow || a - kWindow + n > size)
        fail("%s line %d: shared memory address 0x%x, %u bytes, is outside of dynamic shared memory", what,
             line, a, n);
    return base + (a - kWindow);
}

// ---- 9.7.13.15 mbarrier
struct Mbar {
    unsigned expected, pending, phase;
    int tx;       // bytes announced less bytes brought
    bool watched; // somebody has seen the phase before this one end
    Clock now, last;
};
static auto &g_mbar = *new std::map<uint64_t *, Mbar>;
/* What lies in its 8 bytes: opaque, so ours to choose. */
static uint64_t token(const uint64_t *b, const Mbar &m)
{
    return 0x5b90000000000000u ^ (uint64_t)smem_u32(b) << 32 ^ m.phase;
}
/* That it is initialised has to be known to whoever uses it: a barrier of the block is between. */
static Mbar &mbar(uint64_t *b, int line)
{
    auto it = g_mbar.find(b);
    if (it == g_mbar.end()) fail("line %d: mbarrier at 0x%x is not initialised", line, smem_u32(b));
    touch(b, 8, false, 0, line);
    uint64_t v;
    memcpy(&v, b, 8);
    if (v != token(b, it->second)) fail("line %d: mbarrier at 0x%x was overwritten", line, smem_u32(b));
    return it->second;
}
/* 9.7.13.15.6: a phase ends when no arrival and no byte is missing. */
static void settle(uint64_t *b, Mbar &m)
{
    if (m.pending || m.tx) return;
    m.phase++;
    m.pending = m.expected;
    m.watched = false;
    join(m.last.seen, m.now);
    uint64_t v = token(b, m);
    memcpy(b, &v, 8);
    wake(b);
}
static void count_bytes(Mbar &m, int bytes, int line)
{
    m.tx += bytes;
    if (m.tx >= 1 << 20 || m.tx <= -(1 << 20))
        fail("line %d: tx-count %d of an mbarrier is out of range", line, m.tx);
}
void mbar_init(uint64_t *b, int count, int line, const char *)
{
    if ((uintptr_t)smem_u32(b) & 7 || count < 1 || count >= 1 << 20)
        fail("line %d: mbarrier.init of count %d at 0x%x", line, count, smem_u32(b));
    if (g_mbar.count(b)) fail("line %d: mbarrier at 0x%x is initialised twice", line, smem_u32(b));
    Mbar &m = g_mbar[b] = {};
    m.expected = m.pending = (unsigned)count;
    m.watched = true;
    uint64_t v = token(b, m);
    touch(b, 8, true, 0, line);
    memcpy(b, &v, 8);
    release(m.now);
}
void mbar_arrive(uint64_t *b, int expect, int line, const char *)
{
    Mbar &m = mbar(b, line);
    if (expect < 0 && planted(PLANT_NO_ARRIVE)) return;
    if (expect >= 0 && !planted(PLANT_NO_EXPECT))
        count_bytes(m, expect + (planted(PLANT_MORE_BYTES) ? 16 : 0), line);
    if (!m.watched)
        fail("line %d: arrival on phase %u of an mbarrier, and nobody has waited for the one before", line,
             m.phase);
    if (!m.pending) fail("line %d: more than %u arrivals on an mbarrier in one phase", line, m.expected);
    release(m.now);
    m.pending--;
    settle(b, m);
}
void mbar_wait(uint64_t *b, int parity, int line, const char *file)
{
    Mbar &m = mbar(b, line);
    if (planted(PLANT_PARITY)) parity ^= 1;
    if (parity & ~1) fail("line %d: parity %d", line, parity);
    if (m.expected == 1 ? planted(PLANT_NO_FULL_WAIT) : planted(PLANT_NO_FREE_WAIT)) {
        m.watched = true;
        return;
    }
    while ((m.phase & 1) == (unsigned)parity) {
        sleep_on(b, "mbarrier", line, file);
        (void)mbar(b, line);
    }
    m.watched = true;
    join(cur->seen, m.last);
}

// ---- 9.7.9.25.4.1 cp.async.bulk, 9.7.9.25.5.2 cp.async.bulk.tensor
struct Piece {
    char *to;
    const char *from; // NULL: zeros
    unsigned n;
};
struct Copy {
    Fiber *by;
    unsigned wep;
    uint64_t *bar;
    int line;
    std::vector<Piece> pieces;
};
static auto &g_copies = *new std::vector<Copy>;
static uint32_t g_random;

static void arrive_bytes(const Copy &c)
{
    Mbar &m = mbar(c.bar, c.line);
    unsigned n = 0;
    for (auto &p : c.pieces) n += p.n;
    raise(m.now.seen[c.by->warp], c.wep + 1);
    count_bytes(m, -(int)n, c.line);
    settle(c.bar, m);
}
static void complete(size_t i)
{
    const Copy c = g_copies[i];
    g_copies.erase(g_copies.begin() + (ptrdiff_t)i);
    Fiber *me = cur;
    const unsigned wep = c.by->wep;
    cur = c.by; /* it was asked by that thread, then */
    cur->wep = c.wep;
    for (auto &p : c.pieces) {
        if (p.from)
            memcpy(p.to, p.from, p.n);
        else
            memset(p.to, 0, p.n);
        touch(p.to, p.n, true, ASYNC, c.line);
    }
    cur->wep = wep;
    cur = me;
    arrive_bytes(c);
}
static void issue(Copy &c)
{
    (void)mbar(c.bar, c.line);
    for (auto &p : c.pieces) {
        if (p.from) {
            if (!in_device_memory(p.from, p.n))
                fail("bulk copy line %d: source %p, %u bytes, is not in device memory", c.line,
                     (const void *)p.from, p.n);
            touch(p.from, p.n, false, 0, c.line);
        }
        touch(p.to, p.n, true, INFLIGHT | ASYNC, c.line);
        poison(p.to, p.n);
    }
    g_copies.push_back(c);
    if (opt.eager) complete(g_copies.size() - 1);
}
bool sm90_progress()
{
    if (g_copies.empty()) return false;
    g_random = g_random * 1664525u + 1013904223u;
    complete(opt.order == 1 ? g_copies.size() - 1 : opt.order >= 3 ? (g_random >> 8) % g_copies.size() : 0);
    return true;
}
void bulk_copy(void *smem, const void *gmem, int bytes, uint64_t *b, int line)
{
    const uint32_t to = smem_u32(smem);
    if (bytes <= 0 || bytes & 15 || to & 15 || (uintptr_t)gmem & 15)
        fail("bulk copy line %d: %d bytes from %p to 0x%x: not multiples of 16", line, bytes, gmem, to);
    Copy c{cur, cur->wep, b, line, {}};
    c.pieces.push_back(
        {smem_at(to, (unsigned)bytes, "bulk copy", line), (const char *)gmem, (unsigned)bytes});
    issue(c);
}

// ---- 5.5.7 swizzling modes: bits 4 .. of an address, exchanged by bits 7 ..; `from`: address whose row
// counts as 0
static uint32_t swizzled(uint32_t a, uint32_t row, unsigned span)
{
    return a ^ (row & (span / 16 - 1)) << 4;
}

// ---- tensor maps. Element strides: cuda.h, boxDim and elementStrides.
struct Map {
    uint64_t magic, base, dim[2], stride;
    uint32_t box[2], step, element, span, fill;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");
constexpr uint64_t kMap = 0x7d5e3a9000c0ffeeu;

static CUresult encode(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank, void *address,
                       const cuuint64_t *dim, const cuuint64_t *stride, const cuuint32_t *box,
                       const cuuint32_t *step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill)
{
    static const uint32_t spans[] = {0, 32, 64, 128};
    if (rank != 2) return CUDA_ERROR_NOT_SUPPORTED;
    if ((uintptr_t)map & 63 || (uintptr_t)address & 15) return CUDA_ERROR_INVALID_VALUE;
    if (planted(PLANT_MAP_SWIZZLE)) swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
    Map m = {kMap,      (uint64_t)address, {dim[0], dim[1]},
             stride[0], {box[0], box[1]},  step[1],
             2,         spans[swizzle],    0};
    if (planted(PLANT_MAP_STRIDE)) m.stride += 16;
    for (int i = 0; i < 2; i++)
        if (!m.dim[i] || m.dim[i] > (uint64_t)1 << 32 || !m.box[i] || m.box[i] > 256 || !step[i] ||
            step[i] > 8)
            return CUDA_ERROR_INVALID_VALUE;
    const uint32_t row = m.box[0] * m.element;
    if (m.stride & 15 || m.stride >= (uint64_t)1 << 40 || m.stride < m.dim[0] * m.element)
        return CUDA_ERROR_INVALID_VALUE;
    if (row & 15 || (m.span && row > m.span)) return CUDA_ERROR_INVALID_VALUE;
    memset(map, 0, sizeof *map);
    memcpy(map, &m, sizeof m);
    return CUDA_SUCCESS;
}
/* A box: rows of `box[0]` elements, one after the other (a swizzled row takes its whole span), each piece of
 * 16 bytes where the swizzle of its own address puts it. Outside of the tensor: zeros (5.5.3.3), and they
 * count as bytes. */
void bulk_box(void *smem, const CUtensorMap *map, int x, int y, uint64_t *b, int line)
{
    Map m;
    if ((uintptr_t)map & 63)
        fail("bulk copy line %d: a tensor map at %p, not a multiple of 64", line, (const void *)map);
    memcpy(&m, map, sizeof m);
    if (m.magic != kMap) fail("bulk copy line %d: not a tensor map", line);
    const uint32_t to = smem_u32(smem), row = m.box[0] * m.element, pitch = m.span ? m.span : row;
    if (to & 127) fail("bulk copy line %d: a box to 0x%x, not a multiple of 128", line, to);
    Copy c{cur, cur->wep, b, line, {}};
    for (uint32_t r = 0; r < (m.box[1] + m.step - 1) / m.step; r++)
        for (uint32_t i = 0; i < row; i += 16) {
            const int64_t at_y = y + (int64_t)r * m.step;
            const char *line_of = (const char *)m.base + at_y * (int64_t)m.stride;
            const uint32_t a = to + r * pitch + i, at = m.span ? swizzled(a, a >> 7, m.span) : a;
            char *p = smem_at(at, 16, "bulk copy", line);
            for (uint32_t e = 0; e < 16; e += m.element) { /* runs of elements inside and outside */
                const int64_t at_x = x + (int64_t)((i + e) / m.element);
                const bool in =
                    at_y >= 0 && at_y < (int64_t)m.dim[1] && at_x >= 0 && at_x < (int64_t)m.dim[0];
                const char *from = in ? line_of + at_x * m.element : nullptr;
                Piece *last = e ? &c.pieces.back() : nullptr;
                if (last && (last->from ? from == last->from + last->n : !from))
                    last->n += m.element;
                else
                    c.pieces.push_back({p + e, from, m.element});
            }
        }
    issue(c);
}

// ---- 9.7.13.1 bar: whole warps arrive; 9.7.15.1: four of them are a warpgroup, which must issue the same
struct Bar {
    int threads, arrived;
    unsigned turn;
    uint32_t warps;
    Clock now, last;
};
static Bar g_bar[16];
struct Group {
    std::vector<uint64_t> log;
    size_t at[4];
};
static Group g_group[8];

/* The n-th instruction of every warp of a warpgroup is the same. */
static void uniform(unsigned warp, int line, uint64_t what)
{
    Group &g = g_group[warp / 4];
    const uint64_t word = what * 0x9e3779b97f4a7c15u + (uint64_t)line;
    size_t &at = g.at[warp % 4];
    if (block_threads() % 128)
        fail("line %d: a warpgroup's instruction in a block of %u threads", line, block_threads());
    if (at == g.log.size())
        g.log.push_back(word);
    else if (g.log[at] != word)
        fail("line %d: warps of a warpgroup issue different instructions or descriptors", line);
    at++;
}
namespace
{
struct BarCall : Call {
    int id, threads, line;
    bool wait, done;
};
struct RegCall : Call {
    int n, line;
    bool more;
};
struct MmaCall : Call {
    Mma m;
    int n, line;
};
} // namespace
static void bar_run(Fiber *warp)
{
    BarCall &c = *(BarCall *)warp->call;
    Bar &b = g_bar[c.id];
    if (b.arrived && b.threads != c.threads)
        fail("bar %d line %d: %d threads, and %d by those who came before", c.id, c.line, c.threads,
             b.threads);
    if (b.warps >> warp->warp & 1) fail("bar %d line %d: a warp arrives twice", c.id, c.line);
    b.threads = c.threads;
    b.arrived += 32;
    b.warps |= 1u << warp->warp;
    Fiber *me = cur;
    for (int l = 0; l < 32; l++) {
        cur = warp + l;
        cur->wep++;
        release(b.now);
    }
    cur = me;
    if (b.arrived < b.threads) return;
    b.turn++;
    b.arrived = 0;
    b.warps = 0;
    join(b.last.seen, b.now);
    wake(&b);
}
void bar_sync(int id, int threads, bool wait, int line, const char *file)
{
    if (planted(!wait ? PLANT_NO_BAR_ARRIVE : threads == 128 ? PLANT_NO_BAR_SYNC : PLANT_NO_TURN_SYNC))
        return;
    if (id < 1 || id > 15) fail("bar %d line %d: 0 is __syncthreads", id, line);
    if (threads <= 0 || threads % 32 || threads > (int)block_threads())
        fail("bar %d line %d: %d threads", id, line, threads);
    Bar &b = g_bar[id];
    BarCall c;
    c.run = bar_run;
    c.id = id, c.threads = threads, c.line = line;
    const unsigned turn = b.turn; /* all lanes see the same: their warp has not arrived */
    warp_call(&c, line, file);
    if (!wait) return;
    while (b.turn == turn) sleep_on(&b, "named barrier", line, file);
    join(cur->seen, b.last);
}

// ---- 9.7.19.5 setmaxnreg: from the pool of the block; 65536 registers, the kernel's own share first
static int g_regs[32], g_pool;
static void reg_run(Fiber *warp)
{
    RegCall &c = *(RegCall *)warp->call;
    int &have = g_regs[warp->warp];
    uniform(warp->warp, c.line, (uint64_t)c.n);
    if (c.more ? have > c.n : have < c.n)
        fail("setmaxnreg line %d: %d registers, and the warp has %d", c.line, c.n, have);
    if (c.more) return;
    g_pool += (have - c.n) * 32;
    have = c.n;
    wake(&g_pool);
}
void set_registers(int n, bool more, int line, const char *file)
{
    RegCall c;
    c.run = reg_run;
    c.n = n, c.line = line, c.more = more;
    warp_call(&c, line, file);
    int &have = g_regs[cur->warp];
    if (!more) return;
    while (g_pool < (n - have) * 32) sleep_on(&g_pool, "setmaxnreg", line, file);
    g_pool -= (n - have) * 32; /* by the first lane for its warp */
    have = n;
}

// ---- 9.7.15 wgmma. A warp has rows 16 w .. 16 w + 15 of D, w its place in the warpgroup (figures 148 and
// 149): lane l of row l / 4, and of row l / 4 + 8.
struct Sums { /* an accumulator under way: its values, kept from those who should not look */
    float *where[32];
    int n, uses;
    std::vector<float> v; /* [32][n / 2] */
};
struct Regs { /* A in registers under way */
    uint32_t *where[32], v[32][4];
    int uses;
};
struct Product {
    Sums *d;
    Regs *a;
    Mma m;
    int group, line;
};
static struct Warp {
    std::vector<Product> queue;
    std::map<float *, Sums *> sums; /* by lane 0's address */
    std::map<uint32_t *, Regs *> regs;
    int group; /* of what is issued next */
    bool fenced;
} g_warp[32];
constexpr uint32_t kPoisonD = 0xffbad0d0u, kPoisonA = 0xffbaffbau;

static void put_poison(void *p, uint32_t v, int n)
{
    for (int i = 0; i < n; i++) memcpy((char *)p + 4 * i, &v, 4);
}
static bool is_poison(const void *p, uint32_t v, int n)
{
    for (int i = 0; i < n; i++)
        if (memcmp((const char *)p + 4 * i, &v, 4)) return false;
    return true;
}
static Sums *sums_of(Warp &w, Fiber *warp, const Mma &m, int line)
{
    Sums *&s = w.sums[m.d];
    const bool under_way = s != nullptr;
    if (!under_way) {
        s = new Sums;
        s->n = m.n;
        s->uses = 0;
        s->v.resize((size_t)(16 * m.n));
    }
    if (s->n != m.n) fail("wgmma line %d: an accumulator that another shape still uses", line);
    for (int l = 0; l < 32; l++) {
        float *d = ((MmaCall *)warp[l].call)->m.d;
        if (!under_way) {
            s->where[l] = d;
            memcpy(&s->v[(size_t)(l * m.n / 2)], d, (size_t)m.n * 2);
            put_poison(d, kPoisonD, m.n / 2);
        } else if (s->where[l] != d || !is_poison(d, kPoisonD, m.n / 2)) {
            fail("wgmma line %d: the accumulator was written while a product used it", line);
        }
    }
    s->uses++;
    return s;
}
static Regs *regs_of(Warp &w, Fiber *warp, const Mma &m)
{
    Regs *&r = w.regs[m.a];
    if (!r) {
        r = new Regs;
        r->uses = 0;
        for (int l = 0; l < 32; l++) {
            r->where[l] = ((MmaCall *)warp[l].call)->m.a;
            memcpy(r->v[l], r->where[l], 16);
            put_poison(r->where[l], kPoisonA, 4);
        }
    }
    r->uses++;
    return r;
}

// 9.7.15.5.1.2.2 matrix descriptor format; 9.7.15.5.1.2.1.3 canonical layouts, 2-byte elements (T = 8)
struct Desc {
    uint32_t start, lbo, sbo, span, row0;
};
static Desc decode(uint64_t d, bool step, int line)
{
    static const uint32_t spans[] = {0, 128, 64, 32};
    if (d & 0x3ff1c000c000c000u)
        fail("wgmma line %d: descriptor 0x%016llx has bits that mean nothing", line, (unsigned long long)d);
    Desc r = {(uint32_t)(d & 0x3fff) << 4, (uint32_t)(d >> 16 & 0x3fff) << 4,
              (uint32_t)(d >> 32 & 0x3fff) << 4, spans[d >> 62], (uint32_t)(d >> 49 & 7)};
    if (planted(PLANT_SBO)) r.sbo *= 2;
    if (planted(PLANT_LBO)) r.lbo /= 2;
    if (planted(PLANT_SWIZZLE)) r.span = 64;
    if (planted(PLANT_START) && step) r.start += 16;
    return r;
}
/* Where 8 elements lie together: of row (or column) `mn` from k on, or (across) of k from `mn` on. */
static uint32_t place(const Desc &d, bool across, uint32_t mn, uint32_t k)
{
    uint32_t a = d.start;
    if (!across && d.span)
        a += mn % 8 * d.span + mn / 8 * d.sbo + k * 2; /* ((8,m),(T,2k)):((span,SBO),(1,T)) */
    else if (!across)
        a += mn % 8 * 16 + mn / 8 * d.sbo + k / 8 * d.lbo; /* ((8,m),(T,2k)):((1T,SBO),(1,LBO)) */
    else if (d.span)
        a += mn * 2 % d.span + mn * 2 / d.span * d.lbo + k % 8 * d.span +
             k / 8 * d.sbo; /* ((T,s,m),(8,k)):((1,T,LBO),(span,SBO)) */
    else
        a += mn / 8 * d.sbo + k % 8 * 16 + k / 8 * d.lbo; /* ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO)) */
    return d.span ? swizzled(a, (a >> 7) - d.row0, d.span) : a;
}
/* out[mn][k]; out NULL: only looked at (a byte of each piece), as what must be there when the product is
 * issued. */
static void fetch(const Desc &d, bool across, uint32_t first, uint32_t n, int line, float (*out)[16])
{
    for (uint32_t i = 0; i < (across ? 16u : n); i++)
        for (uint32_t j = 0; j < (across ? n : 16u); j += 8) {
            const uint32_t mn = first + (across ? j : i), k = across ? i : j;
            const uint32_t a = place(d, across, mn, k);
            if (a & 15) fail("wgmma line %d: matrix at 0x%x, not a multiple of 16", line, a);
            const char *p = smem_at(a, 16, "wgmma", line);
            touch(p, out ? 16 : 1, false, ASYNC, line);
            uint16_t v[8];
            memcpy(v, p, 16);
            if (out)
                for (uint32_t e = 0; e < 8; e++)
                    out[mn - first + (across ? e : 0)][k + (across ? 0 : e)] = bf2f(v[e]);
        }
}
static void look(const Product &p, unsigned warp, float (*A)[16], float (*B)[16])
{
    const bool step = p.m.accumulate != 0;
    if (!p.a) fetch(decode(p.m.desc_a, step, p.line), false, warp % 4 * 16, 16, p.line, A);
    fetch(decode(p.m.desc_b, step, p.line), p.m.trans_b, 0, (uint32_t)p.m.n, p.line, B);
}
/* 9.7.15.5.2: D = A B + D or A B, summed exactly here, rounded once. */
static void multiply(Product &p, unsigned warp)
{
    float A[16][16], B[256][16];
    look(p, warp, A, B);
    if (p.a)
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 8; i++)
                A[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] =
                    bf2f((uint16_t)(p.a->v[l][i / 2] >> i % 2 * 16));
    const bool wrong = opt.wrong & (p.a && !p.m.trans_b ? 4 : 8);
    static double across[16][256], sum[256]; /* of rows of B: the compiler's vectors run along n */
    for (int k = 0; k < 16; k++)
        for (int c = 0; c < p.m.n; c++) across[k][c] = (double)B[c][k];
    for (int r = 0; r < 16; r++) {
        auto d = [&](int c) -> float & {
            return p.d->v[(size_t)((r % 8 * 4 + c % 8 / 2) * p.m.n / 2 + c / 8 * 4 + r / 8 * 2 + c % 2)];
        };
        for (int c = 0; c < p.m.n; c++) sum[c] = p.m.accumulate ? (double)d(c) : 0.0;
        for (int k = 0; k < 16; k++) {
            const double a = (double)A[r][k];
            for (int c = 0; c < p.m.n; c++) sum[c] += a * across[k][c];
        }
        if (wrong && r == 3) sum[5] += 1;
        for (int c = 0; c < p.m.n; c++) d(c) = (float)sum[c];
    }
}
static void retire(Warp &w, Product &p, Fiber *warp)
{
    multiply(p, warp->warp);
    if (!--p.d->uses) {
        for (int l = 0; l < 32; l++) {
            if (!is_poison(p.d->where[l], kPoisonD, p.m.n / 2))
                fail("wgmma line %d: the accumulator was written before the wait", p.line);
            memcpy(p.d->where[l], &p.d->v[(size_t)(l * p.m.n / 2)], (size_t)p.m.n * 2);
        }
        w.sums.erase(p.d->where[0]);
        delete p.d;
    }
    if (p.a && !--p.a->uses) {
        for (int l = 0; l < 32; l++) {
            if (!is_poison(p.a->where[l], kPoisonA, 4))
                fail("wgmma line %d: registers of A were written before the wait", p.line);
            memcpy(p.a->where[l], p.a->v[l], 16);
        }
        w.regs.erase(p.a->where[0]);
        delete p.a;
    }
    w.fenced = false; /* 9.7.15.7.1: what was made may be touched now */
}
static void fence_run(Fiber *warp)
{
    uniform(warp->warp, ((MmaCall *)warp->call)->line, 1);
    g_warp[warp->warp].fenced = true;
}
static void commit_run(Fiber *warp)
{
    uniform(warp->warp, ((MmaCall *)warp->call)->line, 2);
    g_warp[warp->warp].group++;
}
static void wait_run(Fiber *warp)
{
    const MmaCall &c = *(MmaCall *)warp->call;
    Warp &w = g_warp[warp->warp];
    uniform(warp->warp, c.line, 3);
    size_t i = 0;
    for (; i < w.queue.size() && w.queue[i].group < w.group - c.n; i++) retire(w, w.queue[i], warp);
    w.queue.erase(w.queue.begin(), w.queue.begin() + (ptrdiff_t)i);
}
static void issue_run(Fiber *warp)
{
    MmaCall &c = *(MmaCall *)warp->call;
    Warp &w = g_warp[warp->warp];
    for (int l = 1; l < 32; l++) {
        const Mma &m = ((MmaCall *)warp[l].call)->m;
        if (m.desc_a != c.m.desc_a || m.desc_b != c.m.desc_b || !m.accumulate != !c.m.accumulate)
            fail("wgmma line %d: lanes with different descriptors", c.line);
    }
    uniform(warp->warp, c.line, c.m.desc_a * 31 + c.m.desc_b * 2 + (c.m.accumulate != 0) + 4);
    if (!w.fenced) fail("wgmma line %d: no wgmma.fence since the registers could be touched", c.line);
    Product p = {sums_of(w, warp, c.m, c.line), c.m.a ? regs_of(w, warp, c.m) : nullptr, c.m, w.group,
                 c.line};
    look(p, warp->warp, nullptr, nullptr);
    w.queue.push_back(p);
}
static void mma_call(MmaCall &c, void (*run)(Fiber *), int line, const char *file)
{
    c.run = run;
    c.line = line;
    warp_call(&c, line, file);
}
void mma_fence(int line, const char *file)
{
    MmaCall c{};
    if (!planted(PLANT_NO_MMA_FENCE)) mma_call(c, fence_run, line, file);
}
void mma_commit(int line, const char *file)
{
    MmaCall c{};
    if (!planted(PLANT_NO_COMMIT)) mma_call(c, commit_run, line, file);
}
void mma_wait(int n, int line, const char *file)
{
    MmaCall c{};
    c.n = n + planted(PLANT_LATE_WAIT);
    if (!planted(PLANT_NO_MMA_WAIT)) mma_call(c, wait_run, line, file);
}
void mma_issue(const Mma &m, int line, const char *file)
{
    MmaCall c{};
    c.m = m;
    mma_call(c, issue_run, line, file);
}
void fence_stores()
{
    if (!planted(PLANT_NO_STORE_FENCE)) cur->fenced = ++cur->wep;
}

// ---- blocks
void sm90_block_begin()
{
    const int share = (int)(65536 / block_threads()) / 8 * 8;
    g_mbar.clear();
    g_copies.clear();
    g_random = (uint32_t)opt.order * 12345u + blockIdx.x;
    for (auto &b : g_bar) b = {};
    for (auto &g : g_group) g = {};
    for (auto &r : g_regs) r = std::min(share, 255);
    g_pool = 0;
    for (auto &w : g_warp) {
        for (auto &s : w.sums) delete s.second;
        for (auto &r : w.regs) delete r.second;
        w = {};
    }
}
void sm90_thread_end()
{
    if (!g_warp[cur->warp].queue.empty()) fail("thread exits with a wgmma that nobody has waited for");
}
void sm90_block_end()
{
    if (!g_copies.empty()) fail("block ends while a bulk copy (line %d) is under way", g_copies[0].line);
    for (auto &g : g_group)
        for (size_t at : g.at)
            if (at != g.log.size()) fail("warps of a warpgroup have not issued the same instructions");
    for (int i = 1; i < 16; i++)
        if (g_bar[i].arrived)
            fail("block ends with %d threads at barrier %d of %d", g_bar[i].arrived, i, g_bar[i].threads);
}
} // namespace simt

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *found)
{
    const bool known = !strcmp(name, "cuTensorMapEncodeTiled") && simt::opt.arch >= 90;
    *entry = known ? (void *)simt::encode : nullptr;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
