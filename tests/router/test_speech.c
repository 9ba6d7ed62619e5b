/* tests/router/test_speech.c - tokens to text with stop strings, token by token, against a plain search over
 * the whole text.
 *
 * The tokenizer's tokens are single bytes, so every stop string and every character that is not ASCII lies
 * across tokens. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/speech.h"
#include "router/text/unicode.h"
#include "tests/router/support_tok.h"
#include "tests/t.h"

typedef struct said { char text[512]; size_t n; int stop; size_t before_end; } said;

static td_job *job_of(const char *const *stop, uint32_t n, bool include)
{
    td_job *j = td_job_new(1 << 12);
    j->stop = stop;
    j->n_stop = n;
    j->include_stop = include;
    j->sampling.n = 1;
    return j;
}

/* All of `in`; what is out after each token is in at[]. */
static said say(const char *const *stop, uint32_t n_stop, bool include, const char *in, size_t n, size_t *at)
{
    said r = {.stop = -1};
    td_job *j = job_of(stop, n_stop, include);
    td_speech *s = td_speech_open(support_tokenizer(), j);
    td_buf out;
    td_buf_init(&out, 0);
    for (size_t i = 0; i < n; i++) {
        int w = td_speech_push(s, 0, (unsigned char)in[i], &out);
        if (r.stop < 0) r.stop = w;
        if (at) at[i] = out.len;
    }
    r.before_end = out.len;
    int w = td_speech_end(s, 0, &out);
    if (r.stop < 0) r.stop = w;
    r.n = out.len;
    memcpy(r.text, out.len ? out.p : "", out.len);
    td_buf_deinit(&out);
    td_speech_close(s);
    td_job_free(j);
    return r;
}

static void expect(const char *const *stop, uint32_t n_stop, bool include, const char *in, const char *want,
                   int which)
{
    said r = say(stop, n_stop, include, in, strlen(in), NULL);
    T_STR(r.text, want);
    T_EQ(r.stop, which);
}

static void by_hand(void)
{
    static const char *const over[] = {"abcd", "bc", "cdx"};
    expect(over, 3, false, "xabcd", "xa", 1);     /* the one that is complete first, though it begins later */
    expect(over, 3, true, "xabcd", "xabc", 1);
    expect(over, 3, false, "xabxcdx!", "xabx", 2);
    expect(over, 3, false, "ababab", "ababab", -1); /* held back to the end, then let out */
    static const char *const same_end[] = {"c", "abc"};
    expect(same_end, 2, false, "xabc", "x", 1);   /* of two that end here the longest */
    static const char *const twice[] = {"aab"};
    expect(twice, 1, false, "aaab", "a", 0);      /* a new start inside a false start */
    expect(twice, 1, true, "aaab!", "aaab", 0);
    static const char *const wide[] = {"\xC3\xA9t"};
    expect(wide, 1, false, "\xC3\xA8\xC3\xA9\xC3\xA9t\xC3\xA9", "\xC3\xA8\xC3\xA9", 0);
    said r = say(wide, 1, false, "a\xC3\xA9", 3, NULL);
    T_OK(r.before_end == 1 && r.n == 3 && r.stop < 0);
    r = say(wide, 1, false, "a\xC3", 2, NULL); /* half a character at the end */
    T_STR(r.text, "a\xEF\xBF\xBD");
    static const char *const mark[] = {"\xEF\xBF\xBD"};
    r = say(mark, 1, false, "a\xC3", 2, NULL); /* the end itself completes a stop string */
    T_OK(r.n == 1 && r.stop == 0);
    expect(NULL, 0, false, "free", "free", -1);
}

static uint32_t state = 7;
static uint32_t rnd(uint32_t n)
{
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state % n;
}

static size_t random_text(char *to, uint32_t pieces)
{
    static const char *const piece[] = {"a", "b", "\xC3\xA9", "\xC3\xA8", "\xE2\x82\xAC", "\xE2\x82\xAE"};
    size_t n = 0;
    for (uint32_t i = 0; i < pieces; i++) {
        const char *p = piece[rnd(6)];
        memcpy(to + n, p, strlen(p));
        n += strlen(p);
    }
    to[n] = 0;
    return n;
}

/* Bytes of whole characters of in[0, n) that cannot be part of a stop string whatever follows. */
static size_t decided(const char *const *stop, uint32_t n_stop, const char *in, size_t n)
{
    while (n && !td_uc_valid(in, n, NULL)) n--; /* half a character is held by the detokenizer */
    size_t best = n;
    for (uint32_t s = 0; s < n_stop; s++)
        for (size_t k = strlen(stop[s]) - 1; k; k--)
            if (k <= n && !memcmp(in + n - k, stop[s], k)) {
                if (n - k < best) best = n - k;
                break;
            }
    return best;
}

static void random_texts(void)
{
    for (int round = 0; round < 3000; round++) {
        char store[4][32], in[256];
        const char *stop[4];
        size_t at[256], n = random_text(in, rnd(30));
        uint32_t n_stop = 1 + rnd(4);
        for (uint32_t i = 0; i < n_stop; i++) random_text(store[i], 1 + rnd(4)), stop[i] = store[i];
        bool include = rnd(2);
        int which = -1;
        size_t end = 0, from = n, out = n;
        for (end = 1; end <= n && which < 0; end++)
            for (uint32_t i = 0; i < n_stop; i++) {
                size_t len = strlen(stop[i]);
                if (len > end || memcmp(in + end - len, stop[i], len) || end - len >= from) continue;
                which = (int)i, from = end - len, out = include ? end : from;
            }
        end--;
        said r = say(stop, n_stop, include, in, n, at);
        T_OK((r.stop >= 0) == (which >= 0) && r.n == out && !memcmp(r.text, in, out), "round %d: %s", round,
             in);
        if (which >= 0) T_STR(r.stop >= 0 ? stop[r.stop] : "", stop[which]);
        bool good = true; /* what was sent never reached into a stop string, and nothing else was held */
        for (size_t i = 0; i < n; i++)
            good &= which >= 0 && i + 1 >= end ? at[i] == out : at[i] == decided(stop, n_stop, in, i + 1);
        T_OK(good, "round %d: held too much or too little of %s", round, in);
    }
}

/* Each choice has a state of its own. */
static void choices(void)
{
    static const char *const stop[] = {"ab"};
    td_job *j = job_of(stop, 1, false);
    j->sampling.n = 2;
    td_speech *s = td_speech_open(support_tokenizer(), j);
    td_buf out;
    td_buf_init(&out, 0);
    T_EQ(td_speech_push(s, 0, 'a', &out), -1);
    T_EQ(td_speech_push(s, 1, 'b', &out), -1);
    T_STR(out.p, "b");
    T_EQ(td_speech_push(s, 0, 'b', &out), 0);
    T_EQ(td_speech_push(s, 1, 'c', &out), -1);
    T_EQ(td_speech_push(s, 0, 'c', &out), -1); /* over */
    T_STR(out.p, "bc");
    td_buf_deinit(&out);
    td_speech_close(s);
    td_job_free(j);
}

int main(void)
{
    by_hand();
    random_texts();
    choices();
    support_tokenizer_close();
    return T_DONE();
}
