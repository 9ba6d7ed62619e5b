// SPDX-License-Identifier: Apache-2.0
/* tests/coll/support_cases.c - the case list. Every message is a pattern of (sender, receiver, operation), so
 * that a block at the wrong place, of the wrong rank or of an earlier operation is seen. */
#include "tests/coll/support_cases.h"
#include "common/clock.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void settled(void) {}

coll_memory coll_mem = {malloc, free, settled};

enum { ANY = 99 }; /* receiver of blocks that go to all */

void coll_check(coll_tally *t, int ok, const char *file, int line, const char *what)
{
    if (ok) {
        t->passed++;
        return;
    }
    if (t->failed++ < 5) printf("%s:%d: failed: %s (%s)\n", file, line, what, td_reason());
}

static unsigned char pattern(int from, int to, int op, size_t i)
{
    return (unsigned char)((size_t)(from * 37 + to * 11 + op * 101) + i * 7 + (i >> 8) * 13);
}

static void fill(void *p, int from, int to, int op, size_t n)
{
    coll_mem.settle();
    for (size_t i = 0; i < n; i++) ((unsigned char *)p)[i] = pattern(from, to, op, i);
}

static int holds(const void *p, int from, int to, int op, size_t n)
{
    coll_mem.settle();
    for (size_t i = 0; i < n; i++)
        if (((const unsigned char *)p)[i] != pattern(from, to, op, i)) return 0;
    return 1;
}

/* Exactly n bytes, so that a sanitizer sees one too many; never NULL. */
static unsigned char *room(size_t n)
{
    unsigned char *p = coll_mem.alloc(n ? n : 1);
    if (!p) abort();
    memset(p, 0xEE, n ? n : 1);
    return p;
}

static void drop(void *p)
{
    coll_mem.settle();
    coll_mem.free(p);
}

static void wipe(void *p, size_t n)
{
    coll_mem.settle();
    memset(p, 0, n);
}

static void case_barrier_bcast(td_coll *c, size_t bytes, int op, coll_tally *t)
{
    int me = td_coll_rank(c);
    unsigned char *buf = room(bytes);
    for (int root = 0; root < td_coll_size(c); root++) {
        if (me == root) fill(buf, root, ANY, op + root, bytes);
        C_IS(t, td_coll_bcast(c, buf, bytes, root), TD_OK);
        C_OK(t, holds(buf, root, ANY, op + root, bytes));
    }
    C_IS(t, td_coll_barrier(c), TD_OK);
    drop(buf);
}

static void case_all_gather(td_coll *c, size_t bytes, int op, coll_tally *t)
{
    int me = td_coll_rank(c), n = td_coll_size(c);
    for (int in_place = 0; in_place < 2; in_place++) {
        unsigned char *recv = room((size_t)n * bytes), *own = room(bytes);
        unsigned char *send = in_place ? recv + (size_t)me * bytes : own;
        fill(send, me, ANY, op + in_place, bytes);
        C_IS(t, td_coll_all_gather(c, send, recv, bytes), TD_OK);
        wipe(own, bytes); /* the call returned: the buffer is the caller's again */
        for (int r = 0; r < n; r++) C_OK(t, holds(recv + (size_t)r * bytes, r, ANY, op + in_place, bytes));
        drop(own);
        drop(recv);
    }
}

/* Rank r has bytes / (r + 1) bytes, rank 1 none; a gap of 3 bytes lies between the blocks. */
static size_t uneven(int n, size_t bytes, size_t *size, size_t *offset)
{
    size_t at = 0;
    for (int r = 0; r < n; r++) {
        size[r] = r == 1 ? 0 : bytes / (size_t)(r + 1);
        offset[r] = at;
        at += size[r] + 3;
    }
    return at;
}

static void case_gatherv(td_coll *c, size_t bytes, int op, coll_tally *t)
{
    int me = td_coll_rank(c), n = td_coll_size(c);
    size_t *size = calloc((size_t)n, sizeof *size), *offset = calloc((size_t)n, sizeof *offset);
    size_t total = uneven(n, bytes, size, offset);
    unsigned char *send = room(size[me]);
    for (int root = 0; root <= n; root++) { /* n: all_gatherv */
        unsigned char *recv = room(total);
        fill(send, me, ANY, op + root, size[me]);
        if (root < n)
            C_IS(t, td_coll_gatherv(c, send, me == root ? recv : NULL, size, offset, root), TD_OK);
        else
            C_IS(t, td_coll_all_gatherv(c, send, recv, size, offset), TD_OK);
        for (int r = 0; r < n && (me == root || root == n); r++) {
            C_OK(t, holds(recv + offset[r], r, ANY, op + root, size[r]));
            C_OK(t, recv[offset[r] + size[r]] == 0xEE);
        }
        drop(recv);
    }
    drop(send);
    free(size);
    free(offset);
}

static void case_all_to_all(td_coll *c, size_t bytes, int op, coll_tally *t)
{
    int me = td_coll_rank(c), n = td_coll_size(c);
    unsigned char *send = room((size_t)n * bytes), *recv = room((size_t)n * bytes);
    for (int r = 0; r < n; r++) fill(send + (size_t)r * bytes, me, r, op, bytes);
    C_IS(t, td_coll_all_to_all(c, send, recv, bytes), TD_OK);
    for (int r = 0; r < n; r++) C_OK(t, holds(recv + (size_t)r * bytes, r, me, op, bytes));
    drop(send);
    drop(recv);
}

/* From a to b: bytes * (a + 2b) % 5 / 4, so that some pairs exchange nothing and none is symmetric. */
static size_t lot(int a, int b, size_t bytes)
{
    return bytes * (size_t)((a + 2 * b) % 5) / 4;
}

static void case_all_to_allv(td_coll *c, size_t bytes, int op, coll_tally *t)
{
    int me = td_coll_rank(c), n = td_coll_size(c);
    size_t *list = calloc((size_t)n * 4, sizeof *list), *ss = list, *so = ss + n, *rs = so + n, *ro = rs + n;
    size_t s_total = 0, r_total = 0;
    for (int r = 0; r < n; r++) {
        so[r] = s_total, ro[r] = r_total;
        s_total += ss[r] = lot(me, r, bytes);
        r_total += rs[r] = lot(r, me, bytes);
    }
    unsigned char *send = room(s_total), *recv = room(r_total);
    for (int r = 0; r < n; r++) fill(send + so[r], me, r, op, ss[r]);
    C_IS(t, td_coll_all_to_allv(c, send, ss, so, recv, rs, ro), TD_OK);
    for (int r = 0; r < n; r++) C_OK(t, holds(recv + ro[r], r, me, op, rs[r]));
    drop(send);
    drop(recv);
    free(list);
}

/* A ring to the right, then a chain of send and recv from rank 0 to the last and back. */
static void case_point_to_point(td_coll *c, size_t bytes, int op, coll_tally *t)
{
    int me = td_coll_rank(c), n = td_coll_size(c), right = (me + 1) % n, left = (me + n - 1) % n;
    size_t from_left = bytes - bytes / 3 * (size_t)(left % 2), mine = bytes - bytes / 3 * (size_t)(me % 2);
    unsigned char *send = room(mine), *recv = room(from_left), *buf = room(bytes);
    fill(send, me, right, op, mine);
    C_IS(t, td_coll_sendrecv(c, right, send, mine, left, recv, from_left), TD_OK);
    C_OK(t, holds(recv, left, me, op, from_left));
    if (me == 0) fill(buf, 0, ANY, op + 1, bytes);
    if (me > 0) C_IS(t, td_coll_recv(c, me - 1, buf, bytes), TD_OK);
    if (me < n - 1) C_IS(t, td_coll_send(c, me + 1, buf, bytes), TD_OK);
    C_OK(t, holds(buf, 0, ANY, op + 1, bytes));
    if (me == n - 1 && n > 1) C_IS(t, td_coll_send(c, 0, buf, bytes), TD_OK);
    if (me == 0 && n > 1) {
        wipe(buf, bytes);
        C_IS(t, td_coll_recv(c, n - 1, buf, bytes), TD_OK);
        C_OK(t, holds(buf, 0, ANY, op + 1, bytes));
    }
    drop(send);
    drop(recv);
    drop(buf);
}

/* All slots at once, waited for out of order, with blocking operations in between. */
static void case_slots(td_coll *c, size_t bytes, int op, coll_tally *t)
{
    int me = td_coll_rank(c), n = td_coll_size(c);
    unsigned char *send[TD_COLL_MAX_PENDING], *recv[TD_COLL_MAX_PENDING];
    for (int k = 0; k < TD_COLL_MAX_PENDING; k++) {
        size_t size = bytes / (size_t)(k + 1);
        send[k] = room(size), recv[k] = room((size_t)n * size);
        fill(send[k], me, ANY, op + k, size);
        C_IS(t, td_coll_all_gather_start(c, k, send[k], recv[k], size), TD_OK);
        if (k == 1) case_all_to_all(c, bytes, op + 9, t);
    }
    case_all_gather(c, bytes, op + 10, t);
    for (int k = TD_COLL_MAX_PENDING - 1; k >= 0; k--) {
        size_t size = bytes / (size_t)(k + 1);
        C_IS(t, td_coll_all_gather_wait(c, k), TD_OK);
        for (int r = 0; r < n; r++) C_OK(t, holds(recv[k] + (size_t)r * size, r, ANY, op + k, size));
        drop(send[k]);
        drop(recv[k]);
    }
}

/* Started sends do not wait for receivers, keep their order, and mix with blocking ones. */
static void case_started_sends(td_coll *c, size_t bytes, int op, coll_tally *t)
{
    int me = td_coll_rank(c), n = td_coll_size(c);
    if (n < 2) return;
    int right = (me + 1) % n, left = (me + n - 1) % n;
    unsigned char *buf[TD_COLL_MAX_PENDING], *got = room(bytes);
    for (int k = 0; k < TD_COLL_MAX_PENDING; k++) {
        buf[k] = room(bytes);
        fill(buf[k], me, right, op + k, bytes);
        C_IS(t, td_coll_send_start(c, k, right, buf[k], bytes), TD_OK);
    }
    /* What nobody takes yet stands in no other's way (but in NCCL, which keeps the order of the calls). */
    if (strcmp(td_coll_name(c), "nccl")) case_all_gather(c, bytes, op + 8, t);
    for (int k = 0; k < TD_COLL_MAX_PENDING; k++) {
        C_IS(t, td_coll_recv(c, left, got, bytes), TD_OK);
        C_OK(t, holds(got, left, me, op + k, bytes));
    }
    for (int k = TD_COLL_MAX_PENDING - 1; k >= 0; k--) {
        C_IS(t, td_coll_send_wait(c, k), TD_OK);
        drop(buf[k]);
    }
    drop(got);
}

/* A message of a rank that computes on arrives while it does: it only pokes now and then. */
static void case_poke(td_coll *c, size_t bytes, int op, coll_tally *t)
{
    enum { PIECES = 500, PIECE_US = 2000 };
    int me = td_coll_rank(c), n = td_coll_size(c);
    int64_t came = 0;
    if (n < 2 || !strcmp(td_coll_name(c), "nccl")) return;
    unsigned char *buf = room(bytes);
    if (me == 0) {
        fill(buf, 0, n - 1, op, bytes);
        C_IS(t, td_coll_send_start(c, 0, n - 1, buf, bytes), TD_OK);
        for (int i = 0; i < PIECES; i++) {
            usleep(PIECE_US);
            C_IS(t, td_coll_poke(c), TD_OK);
        }
        int64_t ended = td_spin_us();
        C_IS(t, td_coll_send_wait(c, 0), TD_OK);
        C_IS(t, td_coll_recv(c, n - 1, &came, sizeof came), TD_OK);
        C_OK(t, came < ended);
    } else if (me == n - 1) {
        C_IS(t, td_coll_recv(c, 0, buf, bytes), TD_OK);
        came = td_spin_us();
        C_OK(t, holds(buf, 0, me, op, bytes));
        C_IS(t, td_coll_send(c, 0, &came, sizeof came), TD_OK);
    }
    drop(buf);
}

/* Rank 0 sends many small messages, the others take them in their own time; the buffer is reused at once. */
static void case_ahead(td_coll *c, int op, coll_tally *t)
{
    enum { MANY = 60, SIZE = 40 };
    unsigned char *buf = room(SIZE);
    int me = td_coll_rank(c), n = td_coll_size(c);
    for (int i = 0; i < MANY; i++) {
        for (int r = 1; me == 0 && r < n; r++) {
            fill(buf, 0, r, op + i, SIZE);
            C_IS(t, td_coll_send(c, r, buf, SIZE), TD_OK);
        }
        if (me == 0) continue;
        C_IS(t, td_coll_recv(c, 0, buf, SIZE), TD_OK);
        C_OK(t, holds(buf, 0, me, op + i, SIZE));
    }
    for (int i = 0; i < MANY; i++) {
        if (me == 0) fill(buf, 0, ANY, op + i, SIZE);
        C_IS(t, td_coll_bcast(c, buf, SIZE, 0), TD_OK);
        C_OK(t, holds(buf, 0, ANY, op + i, SIZE));
    }
    drop(buf);
}

static void case_arguments(td_coll *c, coll_tally *t)
{
    char b[8] = {0};
    int me = td_coll_rank(c), n = td_coll_size(c);
    size_t many[1] = {8};
    C_IS(t, td_coll_bcast(c, b, 1, n), TD_EBADREQ);
    C_IS(t, td_coll_bcast(c, b, 1, -1), TD_EBADREQ);
    C_IS(t, td_coll_bcast(c, NULL, 1, 0), TD_EBADREQ);
    C_IS(t, td_coll_send(c, me, b, 1), TD_EBADREQ);
    C_IS(t, td_coll_recv(c, n, b, 1), TD_EBADREQ);
    C_IS(t, td_coll_all_gather(c, b, NULL, 1), TD_EBADREQ);
    C_IS(t, td_coll_all_gather(c, b, b, SIZE_MAX / 2 + 1), TD_EBADREQ);
    C_IS(t, td_coll_gatherv(c, b, b, NULL, many, 0), TD_EBADREQ);
    C_IS(t, td_coll_sendrecv(c, me, b, 1, me, b + 1, 2), TD_EBADREQ);
    if (n > 1) C_IS(t, td_coll_sendrecv(c, me, b, 1, (me + 1) % n, b + 1, 1), TD_EBADREQ);
    C_IS(t, td_coll_all_gather_wait(c, 0), TD_EBADREQ);
    C_IS(t, td_coll_all_gather_start(c, TD_COLL_MAX_PENDING, b, b, 0), TD_EBADREQ);
    C_IS(t, td_coll_all_gather_start(c, 2, b, b, 0), TD_OK);
    C_IS(t, td_coll_all_gather_start(c, 2, b, b, 0), TD_EBADREQ);
    C_IS(t, td_coll_send_wait(c, 2), TD_EBADREQ);
    C_IS(t, td_coll_all_gather_wait(c, 2), TD_OK);
    C_IS(t, td_coll_all_gather_wait(c, 2), TD_EBADREQ);
    C_IS(t, td_coll_barrier(c), TD_OK); /* none of it harmed the group */
}

static void group_cases(td_coll *c, size_t big, coll_tally *t)
{
    const size_t sizes[] = {0, 1, 3, 48, 49, 1000, 2032, 2033, 4097, 65537, big};
    int op = td_coll_size(c) * 7;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++, op += 17) {
        if (sizes[i] > big) continue;
        case_barrier_bcast(c, sizes[i], op, t);
        case_all_gather(c, sizes[i], op + 1, t);
        case_gatherv(c, sizes[i], op + 2, t);
        case_all_to_all(c, sizes[i], op + 3, t);
        case_all_to_allv(c, sizes[i], op + 4, t);
        case_point_to_point(c, sizes[i], op + 5, t);
        case_slots(c, sizes[i], op + 6, t);
        case_started_sends(c, sizes[i], op + 7, t);
    }
    case_ahead(c, op, t);
    case_arguments(c, t);
}

/* Odd and even ranks, in reverse order; then each of these cut in two; rank 1 of the world in no group. */
static void case_splits(td_coll *c, size_t big, coll_tally *t)
{
    int me = td_coll_rank(c), n = td_coll_size(c);
    td_coll *half = NULL, *quarter = NULL, *some = NULL;
    C_IS(t, td_coll_split(c, me % 2, -me, &half), TD_OK);
    int size = me % 2 ? n / 2 : (n + 1) / 2;
    C_OK(t, td_coll_size(half) == size && td_coll_rank(half) == size - 1 - me / 2);
    int *mine = (void *)room(sizeof *mine), *all = (void *)room((size_t)size * sizeof *all);
    *mine = me;
    C_IS(t, td_coll_all_gather(half, mine, all, sizeof *mine), TD_OK);
    coll_mem.settle();
    for (int i = 0; i < size; i++) C_OK(t, all[i] == me % 2 + 2 * (size - 1 - i));
    C_IS(t, td_coll_split(half, td_coll_rank(half) / 2, 0, &quarter), TD_OK);
    C_OK(t, td_coll_size(quarter) <= 2 && td_coll_rank(quarter) == td_coll_rank(half) % 2);
    group_cases(quarter, 5000, t);
    C_IS(t, td_coll_split(c, me == 1 ? -5 : 0, 0, &some), TD_OK);
    C_OK(t, (some == NULL) == (me == 1));
    if (some) {
        C_OK(t, td_coll_size(some) == (n > 1 ? n - 1 : 1) && td_coll_rank(some) == (me > 1 ? me - 1 : me));
        group_cases(some, 5000, t);
    }
    group_cases(half, big, t);
    drop(mine);
    drop(all);
    td_coll_close(quarter);
    td_coll_close(half);
    td_coll_close(some);
    C_IS(t, td_coll_barrier(c), TD_OK);
}

void coll_cases(td_coll *c, size_t big, coll_tally *t)
{
    group_cases(c, big, t);
    case_poke(c, big < ((size_t)3 << 20) ? big : (size_t)3 << 20, 900, t);
    case_splits(c, big / 3, t);
}
