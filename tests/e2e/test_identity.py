"""The tokens a client receives do not depend on how the cluster computed them: every axis against a base
configuration, and random combinations, byte for byte (token ids and logprobs), greedy and seeded.

    python tests/e2e/test_identity.py [--long] [--seed N]     --long: all 200 prompts
SPDX-License-Identifier: Apache-2.0
"""
import argparse
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

from support.cluster import Cluster, questions

p = argparse.ArgumentParser()
p.add_argument("--long", action="store_true")
p.add_argument("--seed", type=int, default=int(time.time()))
a = p.parse_args()
rng = random.Random(a.seed)
RANDOM = 20  # combinations
print(f"seed {a.seed}", flush=True)

QS = questions()
if not a.long:
    QS = QS[::8]
STORY = max(questions(), key=lambda q: len(q["prompt_ids"]))
LONG = [(STORY["prompt_ids"] + STORY["answer_ids"][:-1])[:330], (QS[0]["prompt_ids"] * 20)[:200]]
JOBS = [(q["prompt_ids"], kind) for q in QS
        for kind in ("greedy", "seeded")] + [(ids, kind) for ids in LONG for kind in ("greedy", "seeded")]


def ask(c, i):
    ids, kind = JOBS[i]
    kw = dict(temperature=0) if kind == "greedy" else dict(temperature=0.9, top_p=0.95, seed=1000 +
                                                           i, frequency_penalty=0.2)
    r = c.complete(ids, max_tokens=40, logprobs=3, **kw)
    ch = r["choices"][0]
    return ch["token_ids"], ch["logprobs"]["token_logprobs"], ch["logprobs"]["top_logprobs"], ch[
        "finish_reason"], ch["text"]


def collect(cfg):
    """cfg: layout (prefill, decode, mixed), chunk, page, threads, together, shuffle, hit."""
    layout = cfg.get("layout", (1, 1, 0))
    extra = ["--page-size", str(cfg.get("page", 16)), "--max-prefill-chunk", str(cfg.get("chunk", 0))]
    if not cfg.get("hit", True):
        extra += ["--no-prefix-cache"]
    with Cluster(prefill=layout[0], decode=layout[1], mixed=layout[2], extra=extra,
                 threads=cfg.get("threads", 1)) as c:
        order = list(range(len(JOBS)))
        if cfg.get("shuffle"):
            random.Random(cfg["shuffle"]).shuffle(order)
        with ThreadPoolExecutor(cfg.get("together", 16)) as pool:
            out = dict(zip(order, pool.map(lambda i: ask(c, i), order)))
        if cfg.get("twice"):
            with ThreadPoolExecutor(cfg.get("together", 16)) as pool:
                again = dict(zip(order, pool.map(lambda i: ask(c, i), order)))
            assert again == out, "the second time, with every prefix cached, differs"
        c.wait_clean()
        happened(c, layout, cfg)
        return out


def happened(c, layout, cfg):
    """Equal answers show nothing unless what is varied did take place."""
    landed, again = (c.metric(f"tandem_handoffs_{what}_total") for what in ("landed", "recomputed"))
    assert landed > max(again, len(JOBS) // 4) if layout[0] else not landed, (cfg, landed, again)
    cached = c.metric("tandem_cached_prompt_tokens_total")
    prompts = sum(len(ids) for ids, _ in JOBS)
    if not cfg.get("hit", True):
        assert not cached, (cfg, cached)
    elif cfg.get("twice"):
        assert cached > prompts // 4, (cfg, cached, prompts)
    if cfg.get("chunk") and layout[0] == 1:
        steps = re.search(r'^tandem_worker_steps_total\{[^}]*role="prefill"[^}]*\} (\S+)$', c.get("/metrics"), re.M)
        assert float(steps[1]) >= len(LONG[0]) // cfg["chunk"], (cfg, steps[0])


base = collect({})
failed = 0


def same(name, cfg):
    global failed
    got = collect(cfg)
    bad = [i for i in base if got[i] != base[i]]
    failed += bool(bad)
    print(
        f"{name}: {len(base) - len(bad)} of {len(base)} equal" +
        (f"; first difference {JOBS[bad[0]]}:\n{base[bad[0]]}\n{got[bad[0]]}" if bad else ""), flush=True)


AXES = {
    "mixed": dict(layout=(0, 0, 1)), "2 prefill + 1 decode": dict(layout=(2, 1, 0)),
    "1 prefill + 2 decode": dict(layout=(1, 2, 0)), "chunk 1": dict(chunk=1), "chunk 7": dict(chunk=7),
    "chunk 16": dict(chunk=16), "chunk 64": dict(chunk=64), "alone": dict(together=1),
    "32 in another order": dict(together=32, shuffle=5), "cached prefixes": dict(twice=True),
    "no prefix cache": dict(hit=False), "page 8": dict(page=8), "page 64": dict(page=64),
    "2 threads": dict(threads=2)
}
for name, cfg in AXES.items():
    same(name, cfg)
for _ in range(RANDOM):
    cfg = dict(layout=rng.choice([(0, 0, 1), (1, 1, 0), (2, 1, 0),
                                  (1, 2, 0)]), chunk=rng.choice([0, 1, 7, 16, 64]),
               page=rng.choice([8, 16, 64]), threads=rng.choice([1, 2]), together=rng.choice([1, 4, 32]),
               shuffle=rng.randrange(1, 99), hit=rng.random() < 0.5, twice=rng.random() < 0.3)
    same(str(cfg), cfg)
print(f"{len(AXES) + RANDOM - failed} passed, {failed} failed")
raise SystemExit(failed != 0)
