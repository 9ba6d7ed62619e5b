"""The demo model's 200 recorded chats, served: equal to transformers' greedy answers token by token up to the
first step whose recorded margin is below the arithmetic's own error (0.25 fast, 1e-3 with --ops ref). Through
the chat endpoint, disaggregated, 32 at a time.
SPDX-License-Identifier: Apache-2.0
"""
from concurrent.futures import ThreadPoolExecutor

from support.cluster import Cluster, questions, sanitized


def first_below(margins, limit):
    return next((i for i, m in enumerate(margins) if m < limit), len(margins))


def check(c, q, limit):
    r = c.chat(q["messages"], temperature=0, max_tokens=160)
    choice = r["choices"][0]
    assert r["prompt_token_ids"] == q["prompt_ids"], (q["messages"], r["prompt_token_ids"])
    n = first_below(q["margin"], limit)
    got, want = choice["token_ids"], q["answer_ids"]
    assert got[:n] == want[:n], f"{q['messages']}: {got[:n]} is not {want[:n]}"
    if n == len(want) and choice["finish_reason"] == "stop":
        assert choice["message"]["content"] == q["answer"], (choice["message"]["content"], q["answer"])
    return n


def run(ops, limit, qs):
    with Cluster(extra=["--ops", ops]) as c:
        with ThreadPoolExecutor(32) as pool:
            n = sum(pool.map(lambda q: check(c, q, limit), qs))
        c.wait_clean()
        print(f"{ops}: {len(qs)} chats, {n} of {sum(len(q['answer_ids']) for q in qs)} tokens checked equal")


run("auto", 0.25, questions())
run("ref", 1e-3, questions()[::20] if sanitized() else questions())
print("2 passed, 0 failed")
