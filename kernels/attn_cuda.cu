// SPDX-License-Identifier: Apache-2.0
/* kernels/attn_cuda.cu - the plan of a step, the merge of partial results, of this device and of several
 * ranks, and what a call launches. */
#include "kernels/attn_cuda_launch.h"
#include "kernels/attn_cuda_tile.h"
#include <string.h>

const char *td_cuda_attn_refuses(int H, int G, int D, int P, td_dtype kv_dtype)
{
    if (D < 8 || D > 256 || D % 8) return "the head dimension must be a multiple of 8 up to 256";
    if (G < 1 || H < G || H % G) return "the query heads must be a multiple of the kv heads";
    if (P < 1 || P > 1 << 20) return "tokens per page must be 1 to 2^20";
    if (kv_dtype != TD_BF16 && kv_dtype != TD_F16) return "pages must be bf16 or f16";
    return NULL;
}
size_t td_cuda_attn_plan_bytes(int n_seq)
{
    return (PLAN_HEAD + 4 * ((size_t)n_seq + 1)) * 4;
}
size_t td_cuda_attn_ws_bytes(size_t max_slots, int D)
{
    return max_slots * ((size_t)D + 2) * 4 + 256;
}

enum { PLAN_THREADS = 256 };

/* Exclusive sum over the block's threads; *total to all. */
static TD_DEV long long plan_scan(long long *s, long long v, long long *total)
{
    const int tid = (int)threadIdx.x;
    s[tid] = v;
    __syncthreads();
    for (int step = 1; step < PLAN_THREADS; step *= 2) {
        long long add = tid >= step ? s[tid - step] : 0;
        __syncthreads();
        s[tid] += add;
        __syncthreads();
    }
    long long before = s[tid] - v;
    *total = s[PLAN_THREADS - 1];
    __syncthreads();
    return before;
}

/* What one sequence costs. few: it may go to the split kernel. */
struct plan_cost {
    long long items, slots, rows, blocks;
    bool few;
};
static TD_DEV plan_cost plan_of(const td_cuda_attn_seq &q, int H, int G, int window, int few, int block_rows,
                                int parts)
{
    plan_cost c = {0, 0, 0, 0, false};
    if (q.n_rows <= 0) return c;
    long long n = (long long)q.n_rows * (H / G);
    if (parts > 0) {
        c.few = true;
        c.items = (n + 15) / 16 * G * parts;
        return c;
    }
    int splits = (q.pos0 + q.n_rows - 1) / TD_CUDA_ATTN_SPLIT -
                 attn_first_key(q.pos0, window) / TD_CUDA_ATTN_SPLIT + 1;
    c.few = n <= few;
    c.items = (n + 15) / 16 * G * splits;
    c.rows = n * G;
    c.slots = c.rows * splits;
    c.blocks = (n + block_rows - 1) / block_rows * G;
    return c;
}

/* One block. */
// limits: regs 64, spill 0, smem 2048
static __global__ void __launch_bounds__(256)
    attn_plan_kernel(const td_cuda_attn_seq *seq, int n_seq, int H, int G, int window, long long max_slots,
                     int few, int block_rows, int parts, int32_t *plan)
{
    __shared__ long long s[PLAN_THREADS];
    const int tid = (int)threadIdx.x, per = (n_seq + PLAN_THREADS - 1) / PLAN_THREADS;
    const int s0 = min(tid * per, n_seq), s1 = min(s0 + per, n_seq);
    int32_t *base = plan + PLAN_HEAD;
    td_grid_launch();
    td_grid_wait();
    long long want = 0, total, sum[4] = {0, 0, 0, 0}, at[4];
    for (int i = s0; i < s1; i++) {
        plan_cost c = plan_of(seq[i], H, G, window, few, block_rows, parts);
        if (c.few) want += c.slots;
    }
    const long long first = plan_scan(s, want, &total);
    for (int pass = 0; pass < 2; pass++) {
        long long used = first;
        for (int i = s0; i < s1; i++) {
            plan_cost c = plan_of(seq[i], H, G, window, few, block_rows, parts);
            if (c.few) {
                used += c.slots;
                c.few = used <= max_slots;
            }
            if (pass)
                for (int k = 0; k < 4; k++) base[k * (n_seq + 1) + i] = (int32_t)at[k];
            long long *to = pass ? at : sum;
            if (c.few) {
                to[0] += c.items;
                to[1] += c.slots;
                to[2] += c.rows;
            } else
                to[3] += c.blocks;
        }
        if (pass) break;
        for (int k = 0; k < 4; k++) {
            at[k] = plan_scan(s, sum[k], &total);
            if (tid == 0) {
                base[k * (n_seq + 1) + n_seq] = (int32_t)total;
                if (k != 1) plan[k == 0 ? PLAN_ITEMS : k == 2 ? PLAN_ROWS : PLAN_BLOCKS] = (int32_t)total;
            }
        }
    }
}

int td_cuda_attn_plan(void *stream, const td_cuda_attn_seq *seq, int n_seq, int H, int G, int D, int window,
                      size_t max_slots, int few, void *plan)
{
    if (n_seq < 0 || n_seq > TD_CUDA_ATTN_MAX_SEQ) return (int)cudaErrorInvalidValue;
    long long most = max_slots < (size_t)INT32_MAX ? (long long)max_slots : INT32_MAX;
    return (int)td_launch_next(attn_plan_kernel, dim3(1), dim3(PLAN_THREADS), 0, (cudaStream_t)stream, seq,
                               n_seq, H, G, window, most, few, attn_block_rows(D), 0, (int32_t *)plan);
}

int td_cuda_attn_plan_parts(void *stream, const td_cuda_attn_seq *seq, int n_seq, int H, int G, int n_parts,
                            void *plan)
{
    if (n_seq < 0 || n_seq > TD_CUDA_ATTN_MAX_SEQ || n_parts < 1) return (int)cudaErrorInvalidValue;
    return (int)td_launch_next(attn_plan_kernel, dim3(1), dim3(PLAN_THREADS), 0, (cudaStream_t)stream, seq,
                               n_seq, H, G, 0, 0ll, 0, 1, n_parts, (int32_t *)plan);
}

/* A warp merges one (row, head) in split order. */
// limits: regs 64, spill 0, smem 0
template <int N>
static __global__ void __launch_bounds__(128) attn_merge_kernel(const attn_args a) /* N: D <= 32 N */
{
    const int lane = (int)threadIdx.x & 31, H = a.G * a.group;
    td_grid_launch();
    td_grid_wait();
    const int n_rows = a.plan[PLAN_ROWS];
    for (int i = (int)(blockIdx.x * 4 + threadIdx.x / 32); i < n_rows; i += (int)gridDim.x * 4) {
        const int s = plan_find(plan_rows(a), a.n_seq, i);
        const td_cuda_attn_seq q = a.seq[s];
        const int rem = i - plan_rows(a)[s], t = rem / H, head = rem % H, g = head / a.group,
                  n = q.n_rows * a.group;
        const int splits = (q.pos0 + q.n_rows - 1) / TD_CUDA_ATTN_SPLIT -
                           attn_first_key(q.pos0, a.window) / TD_CUDA_ATTN_SPLIT + 1;
        size_t slot = (size_t)plan_slots(a)[s] + (size_t)(g * n + t * a.group + head % a.group);
        float O[N] = {}, M = -INFINITY, L = 0.f;
        for (int k = 0; k < splits; k++, slot += (size_t)(n * a.G)) {
            const attn_scale c =
                attn_merge(M, L, __ldcg(&a.part_ml[slot * 2]), __ldcg(&a.part_ml[slot * 2 + 1]));
#pragma unroll
            for (int e = 0; e < N; e++)
                if (lane + e * 32 < a.D)
                    O[e] = attn_merge_o(O[e], __ldcg(&a.part_o[slot * (size_t)a.D + (size_t)(lane + e * 32)]),
                                        c);
        }
        const float end = attn_end(M, L, a.sinks, head);
#pragma unroll
        for (int e = 0; e < N; e++)
            if (lane + e * 32 < a.D)
                attn_store(a, (size_t)(q.row0 + t) * a.ldo + (size_t)(head * a.D + lane + e * 32),
                           O[e] * end);
    }
}

/* ---- parts of several ranks ---- */

struct merge_args {
    const float *part[TD_CUDA_ATTN_MAX_RANKS];
    const float *before;
    float *state, *out;
    size_t ldo;
    int T, H, D, n_parts, ranks;
};

/* As attn_merge_kernel, over parts as they travel. */
// limits: regs 64, spill 0, smem 0
template <int N>
static __global__ void __launch_bounds__(128) attn_parts_kernel(const __grid_constant__ merge_args a)
{
    const int lane = (int)threadIdx.x & 31;
    const size_t unit = (size_t)(a.D + 2);
    td_grid_wait();
    for (int i = (int)(blockIdx.x * 4 + threadIdx.x / 32); i < a.T * a.H; i += (int)gridDim.x * 4) {
        float O[N] = {}, M = -INFINITY, L = 0.f;
        if (a.before) {
            const float *p = a.before + (size_t)i * unit;
            M = p[0];
            L = p[1];
#pragma unroll
            for (int e = 0; e < N; e++)
                if (lane + e * 32 < a.D) O[e] = p[2 + lane + e * 32];
        }
        const size_t at = ((size_t)(i / a.H) * a.n_parts * a.H + i % a.H) * unit;
        for (int u = 0; u < a.n_parts * a.ranks; u++) {
            const float *p = a.part[u % a.ranks] + at + (size_t)(u / a.ranks) * a.H * unit;
            const attn_scale c = attn_merge(M, L, p[0], p[1]);
#pragma unroll
            for (int e = 0; e < N; e++)
                if (lane + e * 32 < a.D) O[e] = attn_merge_o(O[e], p[2 + lane + e * 32], c);
        }
        __syncwarp(); /* all have read before: it may be state */
        float *to = a.state ? a.state + (size_t)i * unit
                            : a.out + (size_t)(i / a.H) * a.ldo + (size_t)(i % a.H) * a.D;
        const float end = a.state ? 1.f : attn_end(M, L, nullptr, 0);
        if (a.state && lane == 0) {
            to[0] = M;
            to[1] = L;
        }
        if (a.state) to += 2;
#pragma unroll
        for (int e = 0; e < N; e++)
            if (lane + e * 32 < a.D) to[lane + e * 32] = a.state ? O[e] : O[e] * end + 0.f;
    }
}

int td_cuda_attn_merge(void *stream, const float *const *part, const float *before, float *state, float *out,
                       size_t ldo, int T, int H, int D, int n_parts, int ranks)
{
    merge_args a = {{}, before, state, out, ldo, T, H, D, n_parts, ranks};
    if (T <= 0) return 0;
    if (ranks < 1 || ranks > TD_CUDA_ATTN_MAX_RANKS || D > 256 || n_parts < 0)
        return (int)cudaErrorInvalidValue;
    for (int r = 0; r < ranks; r++) a.part[r] = part[r];
    long long want = ((long long)T * H + 3) / 4;
    void (*merge)(const merge_args) = D <= 64    ? attn_parts_kernel<2>
                                      : D <= 128 ? attn_parts_kernel<4>
                                                 : attn_parts_kernel<8>;
    return (int)td_launch(merge, dim3((unsigned)(want < 1 << 16 ? want : 1 << 16)), dim3(128), 0,
                          (cudaStream_t)stream, a);
}

attn_args attn_args_of(const td_cuda_attn_args *a)
{
    const td_kv *kv = a->kv;
    attn_args r;
    memset(&r, 0, sizeof r);
    r.q = a->q;
    r.ldq = a->ldq;
    r.out = a->out;
    r.ldo = a->ldo;
    r.out_dtype = a->out_dtype;
    r.kv = (const uint16_t *)td_kv_page(kv, a->slot, 0);
    r.head_elems = (size_t)kv->P * (size_t)kv->D;
    r.v_elems = (size_t)kv->G * r.head_elems;
    r.page_pieces = (uint32_t)(r.v_elems / 4);
    r.P = kv->P;
    r.p_shift = -1;
    for (int i = 0; i < 21; i++)
        if (kv->P == 1 << i) r.p_shift = i;
    r.seq = a->seq;
    r.n_seq = a->n_seq;
    r.pages = a->pages;
    r.plan = (const int32_t *)a->plan;
    r.G = a->G;
    r.group = a->H / a->G;
    r.D = a->D;
    r.window = a->window;
    const float log2e = 1.44269504088896340736f;
    r.scale2 = a->scale * log2e;
    r.softcap = a->softcap;
    if (a->softcap > 0) {
        r.cap_in = a->scale / a->softcap;
        r.cap_out = a->softcap * log2e;
    }
    r.sinks = a->sinks;
    r.part_ml = (float *)a->ws;
    r.part_o = r.part_ml + a->max_slots * 2;
    r.part = a->part;
    r.part0 = a->part0;
    r.n_parts = a->n_parts;
    r.rank = a->rank;
    r.ranks = a->ranks;
    return r;
}

long long attn_most_blocks(const td_cuda_attn_args *a)
{
    int rows = attn_block_rows(a->D);
    long long n = (((long long)a->T * (a->H / a->G) + rows - 1) / rows + a->n_seq) * a->G;
    return n < 1 << 30 ? n : 1 << 30;
}

int td_cuda_attention(void *stream, const td_cuda_attn_args *a)
{
    if (a->n_seq <= 0 || a->T <= 0) return 0;
    attn_args r = attn_args_of(a);
    if ((size_t)a->kv->n_pages * r.page_pieces >= ATTN_NO_KEY) return (int)cudaErrorInvalidValue;
    bool f16 = a->kv->dtype == TD_F16;
    int sms = 0, device = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (e != cudaSuccess) return (int)e;
    if (a->part) return attn_split(stream, r, f16, sms);
    if (a->prompts) {
        int err = attn_prompt(stream, r, f16, (int)attn_most_blocks(a));
        if (err) return err;
    }
    if (!a->few) return 0;
    int err = attn_split(stream, r, f16, sms);
    if (err) return err;
    long long want = ((long long)a->T * a->H + 3) / 4;
    dim3 grid((unsigned)(want < sms * 16 ? want : sms * 16));
    void (*merge)(const attn_args) = a->D <= 64    ? attn_merge_kernel<2>
                                     : a->D <= 128 ? attn_merge_kernel<4>
                                                   : attn_merge_kernel<8>;
    return (int)td_launch_next(merge, grid, dim3(128), 0, (cudaStream_t)stream, r);
}
