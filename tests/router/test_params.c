/* tests/router/test_params.c - every field of a request: what is served, refused, ignored, and with which
 * words. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/params.h"
#include "tests/t.h"

static td_arena arena;
static td_ask ask;
static td_api_error err;
static td_defaults dflt;

static bool parse(td_ask_kind kind, const char *text)
{
    td_arena_deinit(&arena);
    td_arena_init(&arena, 1 << 20);
    td_json *body;
    memset(&err, 0, sizeof err);
    if (td_json_parse(&arena, text, strlen(text), (td_json_limits){0}, &body) != TD_OK) {
        T_OK(0, "not JSON: %s", text);
        return false;
    }
    return td_ask_parse(kind, body, &dflt, 1000, &arena, &ask, &err);
}
#define CHAT(extra) parse(TD_ASK_CHAT, "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]" extra "}")
#define TEXT(extra) parse(TD_ASK_COMPLETION, "{\"prompt\": \"hi\"" extra "}")
#define REFUSED(call, status_, code_, param_)                                                                \
    do {                                                                                                     \
        bool ok_ = (call);                                                                                   \
        T_OK(!ok_ && err.status == (status_) && !strcmp(err.code ? err.code : "", code_) &&                  \
                 !strcmp(err.param, param_),                                                                 \
             "%s: %d %s %s: %s", #call, err.status, err.code ? err.code : "-", err.param, err.message);      \
    } while (0)

static void served(void)
{
    T_OK(TEXT(""));
    T_EQ(ask.s.max_tokens, 16);
    T_EQ(ask.s.n, 1);
    T_EQ(ask.s.logprobs, -1);
    T_EQ(ask.s.prompt_logprobs, -1);
    T_NEAR(ask.s.temperature, 1, 0);
    T_OK(!ask.max_tokens_given && !ask.seed_given && ask.skip_special && ask.add_special);
    T_OK(CHAT(""));
    T_OK(ask.s.max_tokens > 1000000 && !ask.max_tokens_given && !ask.add_special &&
         ask.add_generation_prompt);
    T_OK(TEXT(", \"temperature\": 0.5, \"top_k\": 7, \"top_p\": 0.25, \"min_p\": 0.125, "
              "\"repetition_penalty\": 1.5, \"presence_penalty\": -1, "
              "\"frequency_penalty\": 0.5, \"seed\": -3, \"n\": 4, \"min_tokens\": 2, \"max_tokens\": 9, "
              "\"ignore_eos\": true, "
              "\"logit_bias\": {\"5\": -100, \"7\": 1.5}, \"stop\": [\"a\", \"bc\"], \"stop_token_ids\": [1, "
              "2], \"include_stop_str_in_output\": true, "
              "\"logprobs\": 3, \"stream\": true, \"stream_options\": {\"include_usage\": true}, "
              "\"return_token_ids\": true, \"cache_salt\": \"t\""));
    T_NEAR(ask.s.temperature, 0.5, 0);
    T_NEAR(ask.s.top_p, 0.25, 0);
    T_NEAR(ask.s.min_p, 0.125, 0);
    T_NEAR(ask.s.repetition_penalty, 1.5, 0);
    T_NEAR(ask.s.presence_penalty, -1, 0);
    T_NEAR(ask.s.frequency_penalty, 0.5, 0);
    T_EQ(ask.s.top_k, 7);
    T_EQ((int64_t)ask.s.seed, -3);
    T_OK(ask.seed_given && ask.s.ignore_eos && ask.include_stop && ask.stream && ask.include_usage &&
         ask.return_token_ids && ask.logprobs);
    T_EQ(ask.s.n, 4);
    T_EQ(ask.s.min_tokens, 2);
    T_EQ(ask.s.max_tokens, 9);
    T_EQ(ask.s.n_bias, 2);
    T_EQ(ask.s.bias[1].id, 7);
    T_NEAR(ask.s.bias[1].add, 1.5, 0);
    T_EQ(ask.n_stop, 2);
    T_STR(ask.stop[1], "bc");
    T_EQ(ask.s.n_stop_ids, 2);
    T_EQ(ask.s.logprobs, 3);
    T_STR(ask.salt, "t");
    T_OK(TEXT(", \"stop\": \"one\""));
    T_EQ(ask.n_stop, 1);
    T_OK(CHAT(", \"max_tokens\": 5, \"max_completion_tokens\": 7"));
    T_EQ(ask.s.max_tokens, 7);
    T_OK(CHAT(", \"logprobs\": true, \"top_logprobs\": 5"));
    T_EQ(ask.s.logprobs, 5);
    T_OK(TEXT(", \"temperature\": null, \"n\": null, \"stop\": null, \"seed\": null"));
    T_NEAR(ask.s.temperature, 1, 0);
    T_OK(!ask.seed_given);
}

static void defaults(void)
{
    REFUSED(TEXT(", \"repetition_penalty\": 1e-320"), 400, "invalid_value", "repetition_penalty");
    REFUSED(TEXT(", \"top_p\": 1e-50"), 400, "invalid_value", "top_p");
    dflt = (td_defaults){0.5, 0.9, 7, 0.1, 1.2};
    T_OK(TEXT(""));
    T_NEAR(ask.s.temperature, 0.5, 1e-7);
    T_NEAR(ask.s.top_p, 0.9, 1e-7);
    T_NEAR(ask.s.min_p, 0.1, 1e-7);
    T_NEAR(ask.s.repetition_penalty, 1.2, 1e-7);
    T_EQ(ask.s.top_k, 7);
    T_OK(TEXT(", \"temperature\": 1.5, \"top_k\": 0"));
    T_NEAR(ask.s.temperature, 1.5, 1e-7);
    T_EQ(ask.s.top_k, 0);
    dflt = td_defaults_none();
}

static void prompts(void)
{
    T_OK(parse(TD_ASK_COMPLETION, "{\"prompt\": [\"a\", \"bc\"]}"));
    T_EQ(ask.n_prompts, 2);
    T_EQ(ask.prompts[1].n_text, 2);
    T_OK(parse(TD_ASK_COMPLETION, "{\"prompt\": [1, 2, 3]}"));
    T_EQ(ask.n_prompts, 1);
    T_EQ(ask.prompts[0].n_ids, 3);
    T_OK(parse(TD_ASK_COMPLETION, "{\"prompt\": [[1, 2], [3]]}"));
    T_EQ(ask.n_prompts, 2);
    T_EQ(ask.prompts[1].ids[0], 3);
    REFUSED(parse(TD_ASK_COMPLETION, "{}"), 400, "missing_required_parameter", "prompt");
    REFUSED(parse(TD_ASK_COMPLETION, "{\"prompt\": 5}"), 400, "invalid_type", "prompt");
    REFUSED(parse(TD_ASK_COMPLETION, "{\"prompt\": []}"), 400, "invalid_value", "prompt");
    REFUSED(parse(TD_ASK_COMPLETION, "{\"prompt\": [[]]}"), 400, "invalid_value", "prompt");
    REFUSED(parse(TD_ASK_COMPLETION, "{\"prompt\": [1, \"a\"]}"), 400, "invalid_type", "prompt");
    REFUSED(parse(TD_ASK_COMPLETION, "{\"prompt\": [1.5]}"), 400, "invalid_type", "prompt");
    REFUSED(parse(TD_ASK_COMPLETION, "{\"prompt\": [1000]}"), 400, "invalid_value", "prompt");
    REFUSED(parse(TD_ASK_COMPLETION, "{\"prompt\": [-1]}"), 400, "invalid_value", "prompt");
    REFUSED(parse(TD_ASK_COMPLETION, "[]"), 400, "", "");
    REFUSED(parse(TD_ASK_COMPLETION,
                  "{\"prompt\": [\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\"], \"n\": 128}"),
            400, "invalid_value", "n");
}

static void messages(void)
{
    T_OK(parse(TD_ASK_CHAT, "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"text\", "
                            "\"text\": \"a\"}, {\"type\": \"text\", \"text\": \"b\"}]}]}"));
    T_EQ(td_json_get(ask.messages->child, "content")->n, 2);
    T_OK(CHAT(", \"documents\": [{\"title\": \"t\"}], \"chat_template_kwargs\": {\"think\": true}"));
    T_OK(td_json_bool(ask.template_kwargs, "think", false) &&
         td_json_get(ask.template_kwargs, "documents")->n == 1 && ask.template_kwargs->n == 2);
    REFUSED(CHAT(", \"documents\": 5"), 400, "invalid_type", "documents");
    T_OK(parse(TD_ASK_CHAT,
               "{\"messages\": [{\"role\": \"assistant\", \"content\": null, \"tool_calls\": []}]}"));
    REFUSED(parse(TD_ASK_CHAT, "{\"messages\": [{\"role\": \"user\"}]}"), 400,
            "missing_required_parameter", "messages");
    REFUSED(parse(TD_ASK_CHAT, "{}"), 400, "missing_required_parameter", "messages");
    REFUSED(parse(TD_ASK_CHAT, "{\"messages\": []}"), 400, "invalid_type", "messages");
    REFUSED(parse(TD_ASK_CHAT, "{\"messages\": \"hi\"}"), 400, "invalid_type", "messages");
    REFUSED(parse(TD_ASK_CHAT, "{\"messages\": [{\"content\": \"hi\"}]}"), 400, "invalid_type", "messages");
    REFUSED(parse(TD_ASK_CHAT, "{\"messages\": [{\"role\": \"user\", \"content\": 5}]}"), 400, "invalid_type",
            "messages");
    REFUSED(parse(TD_ASK_CHAT,
                  "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]}"),
            400, "unsupported_parameter", "messages");
    T_OK(CHAT(", \"tools\": [{\"type\": \"function\"}], \"tool_choice\": \"auto\""));
    T_OK(ask.tools != NULL);
    T_OK(CHAT(", \"tools\": [{\"type\": \"function\"}], \"tool_choice\": \"none\""));
    T_OK(ask.tools == NULL);
    REFUSED(CHAT(", \"tools\": [{}], \"tool_choice\": \"required\""), 400, "unsupported_parameter",
            "tool_choice");
    REFUSED(CHAT(", \"tools\": [{}], \"tool_choice\": {\"type\": \"function\"}"), 400,
            "unsupported_parameter", "tool_choice");
    REFUSED(CHAT(", \"tools\": {}"), 400, "invalid_type", "tools");
}

static void ranges(void)
{
    static const struct {
        const char *field, *value, *code;
    } bad[] = {
        {"temperature", "-0.1", "invalid_value"},
        {"temperature", "2.1", "invalid_value"},
        {"temperature", "\"1\"", "invalid_type"},
        {"temperature", "true", "invalid_type"},
        {"top_p", "0", "invalid_value"},
        {"top_p", "1.1", "invalid_value"},
        {"min_p", "-1", "invalid_value"},
        {"top_k", "-2", "invalid_value"},
        {"top_k", "1.5", "invalid_type"},
        {"n", "0", "invalid_value"},
        {"n", "129", "invalid_value"},
        {"n", "-1", "invalid_value"},
        {"n", "1e2", "invalid_type"},
        {"max_tokens", "0", "invalid_value"},
        {"max_tokens", "-5", "invalid_value"},
        {"max_tokens", "\"5\"", "invalid_type"},
        {"max_tokens", "99999999999", "invalid_value"},
        {"repetition_penalty", "0", "invalid_value"},
        {"presence_penalty", "3", "invalid_value"},
        {"frequency_penalty", "-3", "invalid_value"},
        {"seed", "1.5", "invalid_type"},
        {"seed", "99999999999999999999", "invalid_type"},
        {"stop", "5", "invalid_type"},
        {"stop", "[5]", "invalid_type"},
        {"stop", "\"\"", "invalid_value"},
        {"stop", "[\"a\\u0000\"]", "invalid_value"},
        {"stop_token_ids", "[1000]", "invalid_value"},
        {"stop_token_ids", "5", "invalid_type"},
        {"logit_bias", "[]", "invalid_type"},
        {"logit_bias", "{\"a\": 1}", "invalid_value"},
        {"logit_bias", "{\"1000\": 1}", "invalid_value"},
        {"logit_bias", "{\"5\": 101}", "invalid_value"},
        {"logit_bias", "{\"5\": \"x\"}", "invalid_value"},
        {"logprobs", "21", "invalid_value"},
        {"logprobs", "-1", "invalid_value"},
        {"logprobs", "true", "invalid_type"},
        {"prompt_logprobs", "21", "invalid_value"},
        {"stream", "1", "invalid_type"},
        {"stream_options", "{}", "invalid_value"},
        {"echo", "1", "invalid_type"},
        {"ignore_eos", "\"no\"", "invalid_type"},
        {"model", "5", "invalid_type"},
        {"min_tokens", "-1", "invalid_value"},
        {"cache_salt", "5", "invalid_type"},
    };
    for (unsigned i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char text[200];
        snprintf(text, sizeof text, "{\"prompt\": \"hi\", \"%s\": %s}", bad[i].field, bad[i].value);
        REFUSED(parse(TD_ASK_COMPLETION, text), 400, bad[i].code, bad[i].field);
        T_OK(strstr(err.message, bad[i].field) || !strcmp(bad[i].field, "stop") ||
                 !strcmp(bad[i].field, "logit_bias"),
             "%s: %s", text, err.message);
    }
    REFUSED(TEXT(", \"min_tokens\": 9, \"max_tokens\": 8"), 400, "invalid_value", "min_tokens");
    REFUSED(TEXT(", \"best_of\": 2"), 400, "unsupported_parameter", "best_of");
    T_OK(TEXT(", \"best_of\": 2, \"n\": 2"));
    REFUSED(CHAT(", \"top_logprobs\": 2"), 400, "invalid_value", "top_logprobs");
    REFUSED(CHAT(", \"logprobs\": 2"), 400, "invalid_type", "logprobs");
    REFUSED(TEXT(", \"stream\": true, \"prompt_logprobs\": 1"), 400, "unsupported_parameter",
            "prompt_logprobs");
    REFUSED(TEXT(", \"stream\": true, \"echo\": true, \"logprobs\": 1"), 400, "unsupported_parameter",
            "echo");
}

static void echo(void)
{
    T_OK(TEXT(", \"echo\": true, \"logprobs\": 2, \"max_tokens\": 0"));
    T_OK(ask.drop_output && ask.echo);
    T_EQ(ask.s.max_tokens, 1);
    T_EQ(ask.s.prompt_logprobs, 2);
    T_OK(TEXT(", \"echo\": true, \"logprobs\": 0"));
    T_EQ(ask.s.prompt_logprobs, 0);
    T_OK(!ask.prompt_logprobs);
    T_OK(TEXT(", \"echo\": true"));
    T_EQ(ask.s.prompt_logprobs, -1);
}

/* Known and not served: refused, unless the value asks for nothing. */
static void not_served(void)
{
    static const struct {
        const char *json, *param;
    } no[] = {
        {"\"response_format\": {\"type\": \"json_object\"}", "response_format"},
        {"\"guided_json\": {\"a\": 1}", "guided_json"},
        {"\"guided_regex\": \"a*\"", "guided_regex"},
        {"\"guided_choice\": [\"a\", \"b\"]", "guided_choice"},
        {"\"guided_choice\": [\"a\"]", "guided_choice"},
        {"\"structured_outputs\": {\"regex\": \"a\"}", "structured_outputs"},
        {"\"suffix\": \"x\"", "suffix"},
        {"\"use_beam_search\": true", "use_beam_search"},
        {"\"modalities\": [\"text\", \"audio\"]", "modalities"},
        {"\"audio\": {\"voice\": \"x\"}", "audio"},
        {"\"truncate_prompt_tokens\": 5", "truncate_prompt_tokens"},
        {"\"bad_words\": [\"a\"]", "bad_words"},
        {"\"allowed_token_ids\": [1]", "allowed_token_ids"},
        {"\"reasoning_effort\": \"high\"", "reasoning_effort"},
        {"\"priority\": 3", "priority"},
        {"\"prediction\": {\"type\": \"content\"}", "prediction"},
    };
    for (unsigned i = 0; i < sizeof no / sizeof no[0]; i++) {
        char text[200];
        snprintf(text, sizeof text, "{\"prompt\": \"hi\", %s}", no[i].json);
        REFUSED(parse(TD_ASK_COMPLETION, text), 400, "unsupported_parameter", no[i].param);
    }
    T_OK(TEXT(", \"response_format\": {\"type\": \"text\"}, \"guided_json\": null, \"suffix\": \"\", "
              "\"suffix\": null, \"use_beam_search\": false, \"modalities\": [\"text\"], "
              "\"length_penalty\": 1.0, \"bad_words\": [], \"priority\": 0, \"verbosity\": \"medium\""));
    REFUSED(CHAT(", \"functions\": [{\"name\": \"f\"}]"), 400, "unsupported_parameter", "functions");
    REFUSED(CHAT(", \"echo\": true"), 400, "unsupported_parameter", "echo");
    REFUSED(CHAT(", \"continue_final_message\": true"), 400, "unsupported_parameter",
            "continue_final_message");
    T_OK(
        TEXT(", \"user\": \"u\", \"metadata\": {\"a\": \"b\"}, \"store\": true, \"service_tier\": \"auto\""));
    T_EQ(ask.unknown, 0);
    T_OK(TEXT(", \"frobnicate\": 1, \"messages\": []"));
    T_EQ(ask.unknown, 2);
}

static void errors(void)
{
    td_api_error e;
    td_buf b;
    td_buf_init(&b, 0);
    td_api_fail(&e, 400, "x", "p", "say \"%s\"", "no");
    td_api_error_json(&b, &e);
    T_STR(b.p, "{\"error\": {\"message\": \"say \\\"no\\\"\", \"type\": \"invalid_request_error\", "
               "\"param\": \"p\", \"code\": \"x\"}}");
    td_buf_reset(&b);
    td_api_fail(&e, 503, NULL, NULL, "z");
    td_api_error_json(&b, &e);
    T_STR(b.p, "{\"error\": {\"message\": \"z\", \"type\": \"unavailable_error\", \"param\": null, \"code\": "
               "null}}");
    td_buf_deinit(&b);
    static const struct {
        td_why why; int http; td_grpc_status grpc;
    } map[] = {
        {TD_WHY_BAD, 400, TD_GRPC_INVALID_ARGUMENT},
        {TD_WHY_TOO_LONG, 400, TD_GRPC_INVALID_ARGUMENT},
        {TD_WHY_QUEUE_FULL, 429, TD_GRPC_RESOURCE_EXHAUSTED},
        {TD_WHY_NO_WORKER, 503, TD_GRPC_UNAVAILABLE},
        {TD_WHY_DEADLINE, 504, TD_GRPC_DEADLINE},
        {TD_WHY_CANCELLED, 499, TD_GRPC_CANCELLED},
        {TD_WHY_DRAINING, 503, TD_GRPC_UNAVAILABLE},
        {TD_WHY_INTERNAL, 500, TD_GRPC_INTERNAL},
    };
    for (unsigned i = 0; i < sizeof map / sizeof map[0]; i++) {
        td_api_error_of_out(
            &e, &(td_out){.kind = TD_OUT_FAILED, .why = map[i].why, .reason = "r", .retry_ms = 1500});
        T_EQ(e.status, map[i].http);
        T_EQ(td_api_error_grpc(&e), map[i].grpc);
        T_EQ(e.retry_s, 2);
    }
}

int main(void)
{
    dflt = td_defaults_none();
    td_arena_init(&arena, 1 << 20);
    served();
    defaults();
    prompts();
    messages();
    ranges();
    echo();
    not_served();
    errors();
    td_arena_deinit(&arena);
    return T_DONE();
}
