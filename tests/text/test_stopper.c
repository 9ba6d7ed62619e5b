// SPDX-License-Identifier: Apache-2.0
/* Stop strings against a plain search over the whole text, for random strings, texts and cuts. */
#include "router/text/stopper.h"
#include "router/text/unicode.h"
#include "tests/t.h"

static uint32_t state = 12345;
static uint32_t rnd(uint32_t n)
{
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state % n;
}

/* What must come out: the text up to the stop string that ends first, the longest of those. */
static int plain(const char *const *stop, const size_t *len, size_t count, const char *text, size_t n,
                 bool include, size_t *out)
{
    for (size_t end = 1; end <= n; end++) {
        int best = -1;
        for (size_t i = 0; i < count; i++)
            if (len[i] <= end && !memcmp(text + end - len[i], stop[i], len[i]) &&
                (best < 0 || len[i] > len[best]))
                best = (int)i;
        if (best < 0) continue;
        *out = include ? end : end - len[best];
        return best;
    }
    *out = n;
    return -1;
}

static void random_texts(void)
{
    for (int round = 0; round < 20000; round++) {
        char store[TD_STOPPER_STRINGS][8], text[64];
        const char *stop[TD_STOPPER_STRINGS];
        size_t len[TD_STOPPER_STRINGS], count = 1 + rnd(4), n = rnd(40), want_n;
        for (size_t i = 0; i < count; i++) {
            len[i] = 1 + rnd(5);
            for (size_t k = 0; k < len[i]; k++) store[i][k] = (char)('a' + rnd(2));
            stop[i] = store[i];
        }
        for (size_t i = 0; i < n; i++) text[i] = (char)('a' + rnd(3));
        bool include = rnd(2);
        int want = plain(stop, len, count, text, n, include, &want_n);
        td_stopper *s = NULL;
        T_EQ(td_stopper_open(stop, len, count, &s), TD_OK);
        td_stop_state st = {0};
        td_buf out;
        td_buf_init(&out, 0);
        bool hit = false;
        for (size_t i = 0, k; i < n && !hit; i += k) {
            k = 1 + rnd(6);
            if (k > n - i) k = n - i;
            td_stop_state fork = st; /* the state is plain data */
            td_buf other;
            td_buf_init(&other, 0);
            td_stopper_push(s, &fork, "zz", 2, include, &other);
            td_buf_deinit(&other);
            hit = td_stopper_push(s, &st, text + i, k, include, &out);
        }
        td_stopper_flush(s, &st, &out);
        T_OK(hit == (want >= 0) && out.len == want_n && !memcmp(out.p ? out.p : "", text, want_n),
             "round %d: %zu bytes, expected %zu", round, out.len, want_n);
        if (want >= 0) T_OK(len[st.which] == len[want] && !memcmp(stop[st.which], stop[want], len[want]));
        td_buf_deinit(&out);
        td_stopper_close(s);
    }
}

/* Nothing that cannot belong to a stop string is held, and nothing that can is let out. */
static void holds_exactly(void)
{
    const char *stop[] = {"</tool>", "END", "\xC3\xA9!"};
    td_stopper *s;
    td_stop_state st = {0};
    td_buf out;
    td_buf_init(&out, 0);
    T_EQ(td_stopper_open(stop, NULL, 3, &s), TD_OK);
    static const struct {
        const char *in, *out;
    } steps[] = {
        {"abc<", "abc"},
        {"/to", "abc"},
        {"x", "abc</tox"},
        {"E", "abc</tox"},
        {"EN", "abc</toxE"},
        {"\xC3\xA9", "abc</toxEEN"},
        {"\xC3\xA8", "abc</toxEEN\xC3\xA9\xC3\xA8"},
    };
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        T_OK(!td_stopper_push(s, &st, steps[i].in, strlen(steps[i].in), false, &out));
        T_STR(out.p, steps[i].out);
        T_OK(td_uc_valid(out.p, out.len, NULL));
    }
    T_OK(td_stopper_push(s, &st, "  END and more", 14, true, &out));
    T_EQ(st.which, 1);
    T_STR(out.p, "abc</toxEEN\xC3\xA9\xC3\xA8  END");
    T_OK(td_stopper_push(s, &st, "more", 4, true, &out));
    td_stopper_flush(s, &st, &out);
    T_STR(out.p, "abc</toxEEN\xC3\xA9\xC3\xA8  END");
    td_stopper_close(s);
    td_buf_reset(&out);
    st = (td_stop_state){0};
    T_OK(!td_stopper_push(NULL, &st, "free", 4, false, &out));
    T_STR(out.p, "free");
    td_buf_deinit(&out);
}

static void limits(void)
{
    char longest[TD_STOPPER_BYTES + 2];
    const char *many[TD_STOPPER_STRINGS + 1];
    td_stopper *s = NULL;
    memset(longest, 'a', sizeof longest);
    longest[TD_STOPPER_BYTES + 1] = 0;
    for (int i = 0; i <= TD_STOPPER_STRINGS; i++) many[i] = longest + 1; /* 256 bytes each */
    T_EQ(td_stopper_open(many, NULL, TD_STOPPER_STRINGS + 1, &s), TD_EBADREQ);
    T_OK(strstr(td_reason(), "stop: 17 strings") != NULL, "%s", td_reason());
    many[1] = "";
    T_EQ(td_stopper_open(many, NULL, 2, &s), TD_EBADREQ);
    many[1] = longest;
    T_EQ(td_stopper_open(many, NULL, 2, &s), TD_EBADREQ);
    many[1] = many[0];
    T_EQ(td_stopper_open(many, NULL, TD_STOPPER_STRINGS, &s), TD_OK);
    /* A text of the stop string's prefix only: cost stays linear, and all of it comes out in the end. */
    td_stop_state st = {0};
    td_buf out;
    td_buf_init(&out, 0);
    longest[TD_STOPPER_BYTES] = 0;
    for (int i = 0; i < 4000; i++)
        T_OK(!td_stopper_push(s, &st, i % 2 ? longest + 1 : "b", i % 2 ? TD_STOPPER_BYTES - 1 : 1, false,
                              &out));
    td_stopper_flush(s, &st, &out);
    T_EQ(out.len, 2000 * TD_STOPPER_BYTES);
    td_buf_deinit(&out);
    td_stopper_close(s);
}

int main(void)
{
    random_texts();
    holds_exactly();
    limits();
    return T_DONE();
}
