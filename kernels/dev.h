/* kernels/dev.h - where memory and queues of work live: this host, or one CUDA device. A table of functions each.
 *
 * Model:   A device has three streams (compute, copies in, copies out); work of one stream runs in order, streams
 *          meet in events only. On the host every call is done when it returns.
 * Rules:   1. Pointers of alloc() belong to the device: the host reads them with download() only (host device: plain
 *             memory, but tests treat it alike). alloc() contents are undefined; alignment 256.
 *          2. upload and download are queued on the stream given and may still run on return; the host side of them is
 *             staging memory of alloc_host(), or any memory if a sync of that stream follows before it changes.
 *          3. Between capture_begin and capture_end what this thread queues on the stream is taken down instead of
 *             run: kernels, copies and fills with the addresses they were given, to be run in order by each
 *             graph_run. Meanwhile this thread neither waits, asks for events, allocates nor frees: the capture
 *             would be lost (capture_end says so).
 *          4. A failure of a kernel is sticky: sync() reports it as EDEVICE and the process has to end.
 * Ownership: td_dev_open / td_dev_close; everything allocated is freed before close.
 * Threads: open, close: one. Others: any, each on streams of its own; alloc and events from any.
 *          Captures: one at a time.
 * Errors:  td_fail with sizes and the driver's text; where there is no device, td_refuse: it is the caller's to tell. Limits: TD_DEV_MAX_EVENTS live events. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_DEV_H
#define TD_KERNELS_DEV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#include "common/status.h"
#include "kernels/tensor.h"

typedef enum { TD_STREAM_COMPUTE, TD_STREAM_IN, TD_STREAM_OUT, TD_N_STREAMS } td_stream_kind;
typedef struct td_event td_event;
typedef struct td_graph td_graph;
typedef struct td_dev td_dev;
enum { TD_DEV_MAX_EVENTS = 1024 };

/* What tokens have of heads [head0, head0 + n_heads) in slots [slot0, slot0 + n_slots) of a page group. row: of each token, its
 * page * P + its place there (in the device's memory). */
typedef struct td_kv_rows {
    const td_kv *kv;
    const int32_t *row;
    uint32_t n_tok;
    int slot0, n_slots, head0, n_heads;
} td_kv_rows;

struct td_dev {
    const char *kind;             /* "host", "cuda" */
    char name[128];               /* of the device, for logs */
    int index, arch, n_sm;        /* arch: 80, 90, 100; host: 0 */
    size_t total_bytes;           /* of memory; host: 0 */
    void *stream[TD_N_STREAMS];   /* what the launchers of kernels/cuda.h take; host: NULL */

    td_status (*alloc)(td_dev *d, size_t bytes, void **out);
    void (*free)(td_dev *d, void *p);
    td_status (*alloc_host)(td_dev *d, size_t bytes, void **out); /* page-locked staging memory */
    void (*free_host)(td_dev *d, void *p);
    td_status (*free_bytes)(td_dev *d, size_t *out);              /* now */
    td_status (*upload)(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes);
    td_status (*download)(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes);
    td_status (*copy)(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes);
    td_status (*fill)(td_dev *d, td_stream_kind s, void *dst, int byte, size_t bytes);
    td_status (*event_open)(td_dev *d, td_event **out);
    void (*event_close)(td_dev *d, td_event *e);
    td_status (*record)(td_dev *d, td_stream_kind s, td_event *e);
    td_status (*wait)(td_dev *d, td_stream_kind s, td_event *e);  /* the stream waits, not the caller */
    td_status (*elapsed_us)(td_dev *d, td_event *from, td_event *to, double *us); /* both past */
    td_status (*await)(td_dev *d, td_event *e);                   /* the caller waits for what was queued before the record */
    td_status (*sync)(td_dev *d, td_stream_kind s);               /* the caller waits for all that was queued */
    /* Host device: NULL, all four. */
    td_status (*capture_begin)(td_dev *d, td_stream_kind s);
    td_status (*capture_end)(td_dev *d, td_stream_kind s, td_graph **out); /* always ends it; ready to run */
    td_status (*graph_run)(td_dev *d, td_stream_kind s, td_graph *g);      /* what its addresses hold is read then */
    void (*graph_close)(td_dev *d, td_graph *g);                           /* waits for its runs; NULL: nothing */
    /* Rows to a payload [slot][k|v][head][token][D] (worker/ship/codec.h) and back, in one kernel. NULL on the host. */
    td_status (*pack)(td_dev *d, td_stream_kind s, const td_kv_rows *r, void *payload);
    td_status (*unpack)(td_dev *d, td_stream_kind s, const td_kv_rows *r, const void *payload);
    void (*close)(td_dev *d);
};

/* "host", "cuda" (device `index`), or "auto": cuda where there is one. ENOSUP: not in this build, or no device, with
 * the driver's text. */
td_status td_dev_open(const char *kind, int index, td_dev **out);
void td_dev_close(td_dev *d); /* NULL: nothing */

/* CUDA devices of this machine; 0 where none can be used. */
int td_dev_count(void);

/* Internal: of dev_cuda.cu, or of nocuda.c in a build without. */
td_status td_dev_open_cuda(int index, td_dev **out);

#ifdef __cplusplus
}
#endif
#endif
