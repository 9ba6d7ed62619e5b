/* worker/ship/stage.h - the codec over pages in a device's memory: one kernel packs a rectangle into a frame
 * there, one copy brings the frame to page-locked memory of the host; and back.
 *
 *   engine thread     mark: an event behind what is queued on the compute stream
 *   copy-out stream   wait for it, pack, copy            (begin; a few frames ahead)
 *   ship thread       wait for the copy, checksum, send  (gather)
 *
 * Rules:     1. gather reads what was queued on the compute stream before the frame's mark. It waits for this
 *               frame's copy; the engine waits for nothing.
 *            2. scatter queues; after flush the pages are written, and kernels queued then see them.
 *            3. A frame that was begun holds its payload buffer and its pages until gather or forget.
 *            4. Without a device (dev NULL at open) gather and scatter are the codec, at once; the rest does nothing.
 * Threads:   mark: the engine thread. All else: one owner (the ship thread).
 * Errors:    EPROTO: as the codec's false, nothing was touched; AGAIN (begin): as many frames are begun as can be;
 *            EFULL, EDEVICE.
 * Limits:    TD_STAGE_OUT frames begun; TD_STAGE_IN on their way in; frames of frame_bytes; TD_STAGE_MARKS marks:
 *            an older one stands for a later one (it waits for more, never for less). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_STAGE_H
#define TD_WORKER_SHIP_STAGE_H

#include "kernels/dev.h"
#include "worker/ship/codec.h"

enum { TD_STAGE_OUT = 8, TD_STAGE_IN = 4, TD_STAGE_MARKS = 64 };

/* A rectangle with the pages it lies in (codec.h). */
typedef struct td_stage_rect {
    const void *name;            /* of a frame to gather: any pointer that is its alone */
    uint32_t mark;
    const td_codec_side *side;
    const int32_t *pages;
    uint32_t page0, n_pages;
    const td_rect *r;
    const td_token_set *pick;
} td_stage_rect;

typedef struct td_stage_slot {
    const void *name;            /* NULL: free */
    void *host, *frame;          /* page-locked; the device's */
    int32_t *row, *frame_row;    /* td_kv_rows: page-locked; the device's */
    uint32_t n_row;              /* room */
    td_event *done;
} td_stage_slot;

typedef struct td_stage {
    td_dev *dev;
    size_t frame_bytes;
    td_stage_slot out[TD_STAGE_OUT], in[TD_STAGE_IN];
    uint32_t n_in;               /* scattered so far */
    bool writing;
    td_event *mark[TD_STAGE_MARKS];
    uint32_t n_marks;            /* engine thread */
} td_stage;

td_status td_stage_open(td_stage *s, td_dev *dev, size_t frame_bytes);
void td_stage_close(td_stage *s); /* all it queued is done then */
td_status td_stage_mark(td_stage *s, uint32_t *mark);

/* payload: frame_bytes, with a device page-locked (td_dev.alloc_host). */
td_status td_stage_begin(td_stage *s, const td_stage_rect *x, void *payload);
uint32_t td_stage_room(const td_stage *s);                   /* how many more can be begun */
void *td_stage_begun(const td_stage *s, const void *name);   /* the payload of a frame that was begun, or NULL */
void *td_stage_forget(td_stage *s, const void *name);        /* the same; it is not written any more */
td_status td_stage_gather(td_stage *s, const td_stage_rect *x, void *payload, uint32_t *crc);

td_status td_stage_scatter(td_stage *s, const td_stage_rect *x, const void *payload, uint32_t *crc);
td_status td_stage_flush(td_stage *s);

#endif
