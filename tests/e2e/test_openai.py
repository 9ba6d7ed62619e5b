"""The real `openai` client against a disaggregated cluster: chat, completions, streaming, cancel, logprobs,
n, stop, errors.
SPDX-License-Identifier: Apache-2.0
"""
import math

import openai

from support.cluster import Cluster, questions
from support.report import done, ok

QS = questions()
Q = next(q for q in QS if q["task"] == "add" and q["right"])
with Cluster(router_extra=["--api-key", "sk-test"]) as c:
    client = openai.OpenAI(base_url=c.url("/v1"), api_key="sk-test", max_retries=0)
    models = [m.id for m in client.models.list()]
    assert models == ["demo"], models
    assert client.models.retrieve("demo").id == "demo"
    ok("models")

    r = client.chat.completions.create(model="demo", messages=Q["messages"], temperature=0)
    assert r.choices[0].message.content == Q["answer"], (r.choices[0].message.content, Q["answer"])
    assert r.choices[0].finish_reason == "stop" and r.choices[0].message.role == "assistant"
    assert r.usage.prompt_tokens == len(Q["prompt_ids"]) and r.usage.completion_tokens == len(Q["answer_ids"])
    assert r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens
    t = r.model_extra["timings"]
    for key in ("queue_ms", "prefill_ms", "transfer_ms", "transfer_exposed_ms", "ttft_ms", "second_token_ms",
                "kv_bytes_shipped"):
        assert key in t, t
    assert 0 <= t["transfer_exposed_ms"] <= t["transfer_ms"], t # a part of it
    assert t["kv_bytes_shipped"] > 0 and t["ttft_ms"] > 0 and set(t["itl_ms"]) == {"mean", "p99"}, t
    ok("chat with usage and timings")

    parts, finish, usage = [], None, None
    for ev in client.chat.completions.create(model="demo", messages=Q["messages"], temperature=0, stream=True,
                                             stream_options={"include_usage": True}):
        if ev.choices:
            assert ev.choices[0].index == 0
            parts.append(ev.choices[0].delta.content or "")
            finish = ev.choices[0].finish_reason or finish
        usage = ev.usage or usage
    assert "".join(parts) == Q["answer"] and finish == "stop" and usage.completion_tokens == len(
        Q["answer_ids"])
    assert len(parts) > 5, "not streamed"
    ok("chat stream with usage")

    r = client.chat.completions.create(model="demo", messages=Q["messages"], temperature=0, logprobs=True,
                                       top_logprobs=4, max_completion_tokens=9)
    lp = r.choices[0].logprobs.content
    assert len(lp) == 9 and r.choices[0].finish_reason == "length"
    for item in lp:
        assert len(
            item.top_logprobs) == 4 and item.top_logprobs[0].logprob >= item.logprob and item.logprob <= 0
        assert item.token == item.top_logprobs[0].token, "greedy takes the most likely"
        assert sum(math.exp(x.logprob) for x in item.top_logprobs) <= 1 + 1e-5
        assert bytes(item.bytes).decode(errors="replace") == item.token
    ok("chat logprobs")

    r = client.completions.create(model="demo", prompt=Q["prompt_ids"], max_tokens=12, temperature=0,
                                  logprobs=2, echo=True)
    lp = r.choices[0].logprobs
    n = len(Q["prompt_ids"])
    assert len(lp.tokens) == n + 12 and lp.token_logprobs[0] is None and all(x is not None and x <= 0
                                                                             for x in lp.token_logprobs[1:])
    assert len(lp.text_offset) == n + 12
    again = client.completions.create(model="demo", prompt=Q["prompt_ids"], max_tokens=12, temperature=0,
                                      logprobs=2)
    assert again.choices[0].logprobs.token_logprobs == lp.token_logprobs[n:]
    assert r.choices[0].text.endswith(again.choices[0].text)
    ok("echo with prompt logprobs")

    kw = dict(model="demo", messages=Q["messages"], temperature=1.0, max_tokens=24, seed=11)
    r3 = client.chat.completions.create(n=3, **kw)
    texts = [ch.message.content for ch in r3.choices]
    assert [ch.index for ch in r3.choices] == [0, 1, 2]
    assert client.chat.completions.create(n=3, **kw).choices[2].message.content == texts[2]
    assert client.chat.completions.create(n=1, **kw).choices[0].message.content == texts[0]
    ok("n = 3, seeded")

    full = client.chat.completions.create(model="demo", messages=Q["messages"],
                                          temperature=0).choices[0].message.content
    stop = full[len(full) // 2: len(full) // 2 + 5]
    for extra in ({}, {"stream": True}):
        r = client.chat.completions.create(model="demo", messages=Q["messages"], temperature=0,
                                           stop=[stop, "never"], **extra)
        if extra:
            text, finish = "", None
            for ev in r:
                if ev.choices:
                    text += ev.choices[0].delta.content or ""
                    finish = ev.choices[0].finish_reason or finish
        else:
            text, finish = r.choices[0].message.content, r.choices[0].finish_reason
        assert text == full[:full.index(stop)] and finish == "stop", (text, full, stop)
    ok("stop strings, whole and streamed")

    r = client.completions.create(model="demo", prompt=[Q["prompt_ids"], QS[1]["prompt_ids"]], max_tokens=60,
                                  temperature=0)
    assert [ch.index for ch in r.choices
            ] == [0, 1] and r.choices[0].text == Q["answer"] and r.choices[1].text == QS[1]["answer"]
    r = client.completions.create(model="demo", prompt=["Add 1 and 2.", "hello"], max_tokens=5)
    assert len(r.choices) == 2
    ok("several prompts in one call")

    stream = client.chat.completions.create(model="demo", messages=Q["messages"], stream=True,
                                            max_tokens=1500, extra_body={"ignore_eos": True})
    for i, ev in enumerate(stream):
        if i == 3:
            break
    stream.close()
    c.until("requests gone", 5, lambda: c.ledger()["requests"] == 0)
    ok("cancel by closing the stream")

    r = client.chat.completions.create(
        model="demo", messages=Q["messages"], temperature=0, max_tokens=30, extra_body={
            "ignore_eos": True, "min_tokens": 30, "repetition_penalty": 1.1, "top_k": 5, "min_p": 0.01
        }, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={"20": -100})
    assert r.usage.completion_tokens == 30
    ok("every sampling parameter")

    for exc, kind, kw in ((openai.NotFoundError, "model_not_found", dict(model="other",
                                                                         messages=Q["messages"])),
                          (openai.BadRequestError, "context_length_exceeded",
                           dict(model="demo", messages=[{"role": "user", "content": "long text " * 3000}
                                                        ])), (openai.BadRequestError, "unsupported_parameter",
                                                              dict(model="demo", messages=Q["messages"],
                                                                   response_format={"type": "json_object"})),
                          (openai.BadRequestError, None,
                           dict(model="demo", messages=Q["messages"],
                                temperature=3.0)), (openai.BadRequestError, None,
                                                    dict(model="demo", messages=Q["messages"],
                                                         n=0)), (openai.BadRequestError, None,
                                                                 dict(model="demo", messages=[]))):
        try:
            client.chat.completions.create(**kw)
            raise AssertionError(f"accepted: {kw}")
        except exc as e:
            assert isinstance(e.body, dict) and e.body["message"] and (kind is None
                                                                       or e.code == kind), (kw, e.body)
    try:
        openai.OpenAI(base_url=c.url("/v1"), api_key="wrong", max_retries=0).models.list()
        raise AssertionError("a wrong key was accepted")
    except openai.AuthenticationError:
        pass
    ok("errors as the client's exceptions")
    c.procs  # keep the cluster until here
    c.until("requests gone", 5, lambda: c.ledger()["requests"] == 0)
done()
