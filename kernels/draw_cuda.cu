// SPDX-License-Identifier: Apache-2.0
/* kernels/draw_cuda.cu - draws over a vocabulary that lies in parts on several devices: what a rank says in
 * each stage (kernels/draw.h), one block a draw. What it hears is the host's to work out; messages are
 * integers and maxima, so the results are those of sample_cuda.cu over the whole vocabulary, to the bit.
 * Cost: as sample_cuda.cu, over this rank's part; a message to the host and one wait a stage. Not measured.
 */
#include "kernels/draw.h"
#include "kernels/sample_cuda_tile.h"

struct part {
    int V, v0, n;
};

TD_DEV bool wants_report(const td_draw &d)
{
    return d.score >= 0 || d.row.logprobs >= 0;
}

/* The largest of x, NaN left out: 0, or rank_of with ids from v0. */
TD_DEV u64 largest(shared_space *s, const float *x, const part &v)
{
    u64 best = 0;
    for (int i = threadIdx.x; i < v.n; i += (int)blockDim.x) {
        if (x[i] != x[i]) continue;
        const u64 rank = rank_of(x[i], v.v0 + i);
        best = rank > best ? rank : best;
    }
    return block_max(s, best);
}

TD_DEV float value_of_rank(u64 rank)
{
    return rank ? value_of((uint32_t)(rank >> 32)) : -INFINITY;
}

TD_DEV void say_start(shared_space *s, const td_draw &d, const part &v, td_draw_start *to)
{
    const bool plain = td_draw_plain(&d.row), greedy = d.row.temperature < TD_GREEDY_BELOW;
    u64 raw = 0, best = 0;
    if (wants_report(d) || plain) raw = largest(s, d.raw, v);
    if (d.score < 0 && plain) best = raw;
    if (d.score < 0 && !plain) {
        process(d.raw, d.x, v.v0, v.n, d.row);
        best = largest(s, d.x, v);
    }
    const bool live = value_of_rank(best) > -INFINITY;
    if (d.score < 0 && !greedy) {
        for (int i = threadIdx.x; i < v.n; i += (int)blockDim.x) d.x[i] = d.x[i] / d.row.temperature + 0.0f;
        __syncthreads();
        best = largest(s, d.x, v); /* of equal quotients the lowest id */
    }
    if (threadIdx.x != 0) return;
    to->max = value_of_rank(best);
    to->raw_max = value_of_rank(raw);
    to->first = best && (live || !greedy) ? id_of(best) : INT32_MAX;
    to->live = live;
}

TD_DEV void say_cut(shared_space *s, const td_draw &d, const part &v, u64 *to)
{
    const int shift = d.pass == 0 ? 21 : d.pass == 1 ? 10 : 0;
    const uint32_t low = d.pass == 2 ? BINS / 2 - 1 : BINS - 1;
    const uint32_t above = d.pass == 0 ? 0u : ~0u << (d.pass == 1 ? 21 : 10);
    for (int b = threadIdx.x; b < BINS; b += (int)blockDim.x) s->mass[b] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < v.n; i += (int)blockDim.x) {
        const float x = d.x[i];
        const uint32_t key = key_of(x);
        if ((key & above) != d.key || x < d.floor) continue;
        const u64 m = d.by_mass ? fixed(exp_neg(x - d.max)) : (u64)1;
        if (m) atomicAdd(&s->mass[key >> shift & low], m);
    }
    __syncthreads();
    for (int b = threadIdx.x; b < BINS; b += (int)blockDim.x) to[b] = s->mass[b];
}

/* This rank's best of the race, as rank_of. */
TD_DEV u64 say_race(shared_space *s, const td_draw &d, const part &v)
{
    int id = d.id;
    if (d.tie) id = v.v0 + nth_member(s, v.n, d.key, d.tie, d.x, [](float) { return (u64)1; });
    const race r = {{d.key, id}, d.max, d.floor, d.row.min_p, d.filtered};
    return block_max(s, run_race(r, d.x, v.v0, v.n, d.row, d.first));
}

/* Mass and count of the raw logits, and the largest of them after the message. */
TD_DEV void say_raw(shared_space *s, const td_draw &d, const part &v, td_draw_end *m, td_top *top)
{
    const int want = min(max(d.row.logprobs, 0), (int)TD_MAX_TOP_LOGPROBS), at = m->token - v.v0;
    const bool finite = fabsf(d.raw_max) != INFINITY;
    u64 n = 0, mass = 0;
    for (int i = threadIdx.x; i < v.n; i += (int)blockDim.x) {
        const float x = d.raw[i];
        if (x != x) continue;
        n++;
        if (finite) mass += fixed(exp_neg(x - d.raw_max));
    }
    n = block_sum(s, n);
    m->mass = block_sum(s, mass);
    m->n_top = (u64)want > n ? (int)n : want;
    m->owned = m->token >= 0 && at >= 0 && at < v.n;
    if (m->owned) m->raw = d.raw[at];
    if (m->n_top) top_n(s, d.raw, v.n, m->n_top, 0.0, top);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < want; i += (int)blockDim.x) {
        if (i < m->n_top)
            top[i].id += (uint32_t)v.v0;
        else
            top[i] = td_top{0u, 0.f};
    }
}

TD_DEV void say_end(shared_space *s, const td_draw &d, const part &v, td_draw_end *to)
{
    td_draw_end m = {0.f, 0.f, d.token, 0, 0, 0, 0};
    if (d.token == INT32_MAX) {
        const u64 best = say_race(s, d, v);
        m.best = value_of_rank(best);
        m.token = id_of(best);
    }
    __syncthreads();
    if (wants_report(d)) say_raw(s, d, v, &m, (td_top *)(to + 1));
    if (threadIdx.x == 0) *to = m;
}

/* Draws without bytes left are over. */
// limits: regs 64, spill 0, smem 18432
static __global__ void __launch_bounds__(1024, 1)
    draw_say(const td_draw *draws, part v, unsigned char *message)
{
    __shared__ shared_space s;
    td_grid_wait();
    const td_draw d = draws[blockIdx.x];
    unsigned char *to = message + d.at;
    if (!d.bytes) return;
    if (d.stage == TD_DRAW_START)
        say_start(&s, d, v, (td_draw_start *)to);
    else if (d.stage == TD_DRAW_CUT)
        say_cut(&s, d, v, (u64 *)to);
    else
        say_end(&s, d, v, (td_draw_end *)to);
}

extern "C" int td_cuda_draw_say(td_stream s, const td_vocab *v, const td_draw *draws, int n,
                                unsigned char *message)
{
    if (n == 0) return 0;
    if (v->V < 1 || v->V >= 1 << 19 || (v->n && v->v0 % 32)) return cudaErrorInvalidValue;
    return td_launch(draw_say, (unsigned)n,
                     v->n <= 1024   ? 128u
                     : v->n <= 8192 ? 512u
                                    : 1024u,
                     0, (cudaStream_t)s, draws, part{v->V, v->v0, v->n}, message);
}
