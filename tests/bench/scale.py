"""Step times of every parallel mode by arithmetic, for 8 and 64 H200 and for this machine; writes tests/bench/scale.md.

    python tests/bench/scale.py

The same function `layer` predicts both: with the figures of an H200 node (published measurements, below) and with what
tests/bench/ranks.py and coll.py measured here (results/ranks.json, coll.json), so that its terms are checked against
something. What is exchanged is what worker/model does: parts of sums as f32 (whole rows to all TP ranks, or blocks from
BLOCK_FLOATS on), keys and values round the CP ring or queries to the keys, an all-to-all of rows for experts.
SPDX-License-Identifier: Apache-2.0
"""
import json
import math
import os
import re
from dataclasses import dataclass, replace

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class Link:  # one exchange of a group: seconds + bytes that a rank receives / (bytes a second)
    seconds: float
    rate: float

    def time(self, received):
        return self.seconds + received / self.rate if received else 0.0


@dataclass(frozen=True)
class Machine:
    name: str
    read: float  # bytes/s of memory, one rank
    flops: float  # operations/s, one rank
    memory: float  # bytes, one rank
    per_layer: float  # seconds between kernels, a layer
    node: int  # ranks that the inner links join
    inner: Link
    outer: Link
    experts_inner: Link
    experts_outer: Link
    ops_dtype: float = 2  # bytes of a weight
    split: int = 4096  # keys per attention split
    block_floats: int = 1 << 16
    hides: bool = True  # a gather goes on beside computation; False: the cores that compute copy it

    def link(self, size, stride, experts=False):
        near = size * stride <= self.node
        return (self.experts_inner if near else self.experts_outer) if experts else (self.inner if near else self.outer)


@dataclass(frozen=True)
class Model:
    name: str
    E: int
    H: int
    G: int
    D: int
    L: int
    V: int
    F: int = 0
    X: int = 0  # experts
    top: int = 0
    XF: int = 0

    def attn(self):
        return self.E * ((self.H + 2 * self.G) * self.D + self.H * self.D)

    def ffn(self):
        return 3 * self.E * self.F

    def expert(self):
        return 3 * self.E * self.XF

    def weights(self):
        return self.L * (self.attn() + self.ffn() + self.X * self.expert()) + 2 * self.E * self.V


@dataclass(frozen=True)
class Shape:
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: bool = False
    fsdp: bool = False

    def ranks(self):
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self):
        parts = [f"{k}{getattr(self, k)}" for k in ("tp", "pp", "cp", "dp") if getattr(self, k) > 1]
        return " ".join(parts + ["ep"] * self.ep + ["fsdp"] * self.fsdp) or "one rank"


def layer(m, d, s, rows, context, attended, wanted=True):
    """Seconds of one layer on one rank: {term: seconds}. rows: of this replica's step, all CP ranks together; context: keys a
    row sees, on average; attended: keys and values that are read once for all rows (bytes are per sequence: rows of a decode)."""
    own = rows / s.cp
    Gt = max(d.G / s.tp, 1)
    b = m.ops_dtype
    dense = (d.attn() + d.ffn()) / s.tp
    t = {"weights": dense * b / m.read, "products": 2 * dense * own / m.flops}
    stage = s.tp * s.cp * s.dp if s.ep else 1  # ranks that experts are dealt to
    if d.X:
        seen = rows * (s.dp if s.ep else 1)  # rows whose experts may be here
        here = d.X / stage * (1 - (1 - d.top / d.X) ** seen)
        cut = 1 if s.ep else s.tp
        t["weights"] += here * d.expert() / cut * b / m.read
        t["products"] += 2 * (seen / stage if s.ep else own / s.tp) * d.top * d.expert() / m.flops
    t["roofline"] = max(t.pop("weights"), t.pop("products"))
    t["attention"] = max(attended * 2 * Gt * d.D * b / s.cp / m.read, 4 * own * context * d.H / s.tp * d.D / m.flops)
    t["between"] = m.per_layer
    t["tp"] = t["cp"] = t["ep"] = 0.0
    tp = m.link(s.tp, 1)
    if s.tp > 1:
        whole = own * d.E * 4
        if own * d.E >= m.block_floats:  # a block of rows to each, then put together
            t["tp"] = 2 * 2 * tp.time(whole * (s.tp - 1) / s.tp)
        else:
            t["tp"] = 2 * tp.time(whole * (s.tp - 1))
    if s.cp > 1:
        cp = m.link(s.cp, s.tp)
        far = (s.cp - 1) / s.cp
        parts = math.ceil(math.ceil(context / m.split) / s.cp)
        kv = far * attended * 2 * Gt * d.D * b
        qs = far * rows * d.H / s.tp * (d.D + parts * (d.D + 2)) * 4
        append = cp.time(far * rows * 2 * Gt * d.D * 4)
        t["cp"] = append + ((s.cp - 1) * cp.seconds + kv / cp.rate if kv < qs else 2 * cp.seconds + qs / cp.rate)
    if d.X and s.ep and stage > 1:
        link = m.link(stage, 1, True)
        t["ep"] = 2 * link.time(rows / (s.tp * s.cp) * d.top * d.E * b * (stage - 1) / stage)
    if s.fsdp:
        n = s.cp * s.dp
        whole = (d.attn() + d.ffn() + (0 if s.ep else d.X * d.expert())) / s.tp * b
        gather = m.link(n, s.tp).time(whole * (n - 1) / n)
        t["fsdp"] = max(0.0, gather - (sum(t.values()) if m.hides else 0))  # what the rest of the layer does not cover
    return t


def memory(m, d, s, tokens):
    """Bytes of a rank: weights, and KV of `tokens` tokens in a replica."""
    n = s.cp * s.dp if s.fsdp else 1
    stage = s.tp * s.cp * s.dp
    dense = (d.L * (d.attn() + d.ffn()) / s.pp + 2 * d.E * d.V / s.pp) / s.tp / n
    experts = d.L * d.X * d.expert() / s.pp / (stage if s.ep else s.tp * n)
    kv = tokens * d.L / s.pp * 2 * max(d.G / s.tp, 1) * d.D * 2 / s.cp
    return (dense + experts) * m.ops_dtype + kv


def head(m, d, s, rows):
    w = d.E * d.V / s.tp
    return max(w * m.ops_dtype / m.read, 2 * w * rows / s.cp / m.flops) + (m.link(s.tp, 1).time(rows * d.V * 4 * (s.tp - 1) / s.tp) if s.tp > 1 else 0)


def pass_on(m, d, s, rows):
    return m.link(s.pp, s.tp * s.cp).time(rows / s.cp * d.E * 4) if s.pp > 1 else 0.0


def decode(m, d, s, batch, context):
    """(seconds a token, tokens/s of all replicas) with `batch` sequences in all, `context` keys each."""
    own = batch / s.dp
    if own < 1:
        own = 1
    micro = max(1, min(s.pp, int(own)))
    rows = own / micro
    per = sum(layer(m, d, s, rows, context, rows * context).values()) * d.L / s.pp + pass_on(m, d, s, rows) + head(m, d, s, rows) / s.pp
    token = per * max(s.pp, micro)
    return token, min(batch, own * s.dp) / token


def prefill(m, d, s, prompt, chunk=None):
    """(seconds to the first token of one prompt, prompt tokens/s of all replicas busy)."""
    n = max(1, min(round(prompt / 64), 32 * (s.pp - 1))) if s.pp > 1 else 1
    if chunk:
        n = max(n, math.ceil(prompt / chunk))
    rows = prompt / n
    per = sum(layer(m, d, s, rows, prompt / 2, prompt / 2 if n > 1 else prompt).values()) * d.L / s.pp + pass_on(m, d, s, rows)
    first = per * (n + s.pp - 1) + head(m, d, s, 1)
    return first, s.dp * prompt / (per * n + (head(m, d, s, 1) if s.pp == 1 else 0))


# ---- H200 ----
# Memory 4.8 TB/s of which streams reach 4.3; cuBLASLt bf16 about 0.75 PFLOP/s; 1.3 us between kernels, about ten a layer.
# NVLink: all-reduce 475 GB/s bus (8 ranks, NCCL); one-shot exchanges of 512 B in 3.7 / 4.8 / 5.9 us (2 / 4 / 8 ranks).
# InfiniBand: 400 Gb/s a GPU, 45 GB/s of it used; 15 us. Experts: DeepEP low latency, 128 tokens of 7,168 to 8 experts:
# 77 us (7.3 MB) and 114 us (14.7 MB) in a node = 40 us + 198 GB/s; 173 and 314 us over 64 ranks = 32 us + 52 GB/s.
H200 = Machine("H200", 4.3e12, 750e12, 141e9 * 0.92, 13e-6, 8, Link(6e-6, 370e9), Link(15e-6, 45e9), Link(40e-6, 198e9), Link(32e-6, 52e9))
DENSE = Model("dense 70b", 8192, 64, 8, 128, 80, 128256, F=28672)
MOE = Model("MoE 235b-a22b", 4096, 64, 4, 128, 94, 151936, X=128, top=8, XF=1536)
SMALL = Model("1b", 2048, 32, 8, 64, 16, 128256, F=8192)


def shapes(d, n):
    out = []
    for tp in (1, 2, 4, 8, 16):
        for pp in (1, 2, 4, 8):
            for cp in (1, 2, 4, 8):
                if n % (tp * pp * cp) or tp > d.H:
                    continue
                dp = n // (tp * pp * cp)
                for ep in (False, True) if d.X else (False,):
                    if ep and (dp * cp * tp > d.X or dp * cp * tp == 1):
                        continue
                    for fsdp in (False, True) if dp * cp > 1 else (False,):
                        out.append(Shape(tp, pp, cp, dp, ep, fsdp))
    return out


def fits(s, d, tokens_all, longest):
    per_replica = max(tokens_all / s.dp, longest)
    return memory(H200, d, s, per_replica) <= H200.memory


def ms(x):
    return f"{x * 1e3:.1f}" if x < 1 else f"{x * 1e3:,.0f}"


def table(head_, rows):
    yield "| " + " | ".join(head_) + " |"
    yield "|" + "---|" * len(head_)
    for r in rows:
        yield "| " + " | ".join(str(c) for c in r) + " |"


def best_decode(d, n, batch, context):
    ok = [s for s in shapes(d, n) if fits(s, d, batch * context, context)]
    if not ok:
        return None
    rate = max(ok, key=lambda s: decode(H200, d, s, batch, context)[1])
    fast = min(ok, key=lambda s: decode(H200, d, s, batch, context)[0])
    return fast, decode(H200, d, fast, batch, context), rate, decode(H200, d, rate, batch, context)


def decode_table(d, n):
    rows = []
    for context in (1024, 8192, 131072):
        for batch in (1, 32, 256, 2048):
            b = best_decode(d, n, batch, context)
            if b is None:
                rows.append((f"{context:,}", batch, "does not fit", "", "", "", ""))
                continue
            fast, f, rate, r = b
            rows.append((f"{context:,}", batch, fast, ms(f[0]), rate, ms(r[0]), f"{r[1]:,.0f}"))
    return table(("context", "sequences", "least time", "ms a token", "most tokens", "ms a token", "tokens/s"), rows)


def prefill_table(d, n):
    rows = []
    for prompt in (2048, 16384, 131072, 1048576):
        ok = [s for s in shapes(d, n) if fits(s, d, prompt, prompt)]
        if not ok:
            rows.append((f"{prompt:,}", "does not fit", "", "", ""))
            continue
        fast = min(ok, key=lambda s: prefill(H200, d, s, prompt)[0])
        rate = max(ok, key=lambda s: prefill(H200, d, s, prompt)[1])
        rows.append((f"{prompt:,}", fast, ms(prefill(H200, d, fast, prompt)[0]), rate, f"{prefill(H200, d, rate, prompt)[1]:,.0f}"))
    return table(("prompt", "least time", "ms to the first token", "most tokens", "tokens/s"), rows)


def modes_table(d, n, base, modes):
    """One mode at a time on n ranks: what each does to a step."""
    rows = []
    for s in modes:
        s = replace(s, dp=n // (s.tp * s.pp * s.cp))
        cells = [s, f"{memory(H200, d, s, 8192) / 1e9:.0f}"]
        for batch, context in base:
            room = fits(s, d, batch * context, context)
            t, r = decode(H200, d, s, batch, context)
            cells.append(f"{ms(t)} / {r:,.0f}" if room else "no room")
        for prompt in (2048, 131072):
            t, r = prefill(H200, d, s, prompt)
            cells.append(f"{ms(t)} / {r:,.0f}" if fits(s, d, prompt, prompt) else "no room")
        rows.append(cells)
    return table(["shape", "GB a rank, 8k tokens"] + [f"{b} x {c:,}" for b, c in base] + ["prompt 2,048", "prompt 131,072"], rows)


def terms_table(d, cases):
    rows = []
    for s, rows_, context in cases:
        t = layer(H200, d, s, rows_, context, rows_ * context)
        total = sum(t.values())
        rows.append([s, f"{rows_} x {context:,}", f"{total * 1e6:.0f}"] + [f"{100 * t.get(k, 0) / total:.0f}" for k in
                    ("roofline", "attention", "between", "tp", "cp", "ep", "fsdp")])
    return table(("shape", "rows x context", "us a layer", "weights and products %", "attention %", "between kernels %", "TP %", "CP %", "EP %", "FSDP %"), rows)


# ---- this machine ----

def load(name):
    with open(os.path.join(HERE, "results", name)) as f:
        return json.load(f)


def here(read, flops, coll):
    us = coll["mpi"]["us"]
    small = us["exchange"] * 1e-6
    link = Link(small, (1 << 20) / (us["gather"] * 1e-6 - small))
    return Machine("here", read, flops, 0, 0, 8, link, link, link, link, split=256, hides=False)


def check():
    """Rows of the table of predictions against measurements."""
    r, coll = load("ranks.json"), load("coll.json")
    rows = []
    for what, name, shape, kind, arg in (
            ("tp", "prefill", Shape(tp=2), "prefill", 512), ("tp", "decode_1", Shape(tp=2), "decode", 1), ("tp", "decode_8", Shape(tp=2), "decode", 8),
            ("pp", "decode_16", Shape(pp=2), "decode", 16), ("chunks", "prefill_chunks", Shape(pp=2), "prefill", 2048),
            ("fsdp", "prefill", Shape(cp=2, fsdp=True), "prefill", 512), ("fsdp", "decode_8", Shape(cp=2, fsdp=True), "decode", 8)):
        if what not in r or name not in r[what]:
            continue
        e = r[what][name]
        if name == "prefill":
            arg = int(re.search(r"--prompt (\d+)", r[what]["command"])[1])
        read, flops = max(e["read_gb_s"]) * 1e9, max(e["peak_gflop_s"]) * 1e9
        one, two = here(read, flops, coll), here(read / 2, flops / 2, coll)  # two ranks share what two threads have
        if kind == "decode":
            a = decode(one, SMALL, Shape(), min(arg, 8), 32)[1]
            b = decode(two, SMALL, shape, arg, 32)[1]
        else:
            a, b = prefill(one, SMALL, Shape(), arg)[1], arg / prefill(two, SMALL, shape, arg)[0]
        rows.append((f"{what} {name}", f"{a:.1f}", f"{e['one_tok_s']:.1f}", f"{e['one_cpu_tok_s']:.1f}", f"{b / a:.2f}", f"{e['wall_best']:.2f}",
                     f"{e['wall_median']:.2f}", f"{e['cpu_best']:.2f}", f"{e['wall_best'] / (b / a):.2f}", f"{e['cpu_best'] / (b / a):.2f}"))
    return table(("case", "one process, predicted tokens/s", "by the clock", "by processor time", "two ranks / one: predicted", "clock, best", "clock, median",
                  "processor time", "clock / predicted", "processor time / predicted"), rows), r


CONCLUSIONS = """
- **TP within a node is what makes one sequence fast.** Dense 70b, one sequence of 8k: 6.2 ms a token with TP 8, 10.3 with TP 4, 18.5 with
  TP 2; the MoE 3.8 with TP 8. Its exchanges are 17 % of a layer for one row and 26 % for 64, so from some hundred sequences on TP 4 x DP 2
  makes more tokens than TP 8. TP 16 crosses the node: 70 % of a layer is exchange. Never.
- **PP costs nothing on the wire and does not shorten a token.** Each micro-batch reads the weights again, so it pays where steps are bound
  by operations: prompts (131k tokens of 70b: 7.0 s with PP 8, 10.0 with TP 8), thousands of sequences (2,048 x 1k: PP 4 x DP 2), and
  between nodes, beside TP within them (131k tokens on 64: TP 4 x PP 8 x CP 2).
- **CP shortens the first token.** A prompt of 2k: TP 2 x CP 4 62 ms, TP 8 101 ms; on 64, TP 8 x CP 8. In decode it only makes room: for a
  context whose KV does not fit one group of TP ranks.
- **EP pays for throughput, not for latency.** One sequence: 17.9 ms with EP 8, 3.8 with TP 8, because the two all-to-alls alone are 80 us
  a layer. With 256 sequences of 8k the MoE does not fit as TP 8 (4 KV heads, held twice), and attention by DP with experts by EP gives
  the most; on 64 ranks from 256 sequences on. The all-to-all is then half of a layer: the next thing to overlap.
- **FSDP is for prompts.** A step of 70b gathers 17.7 GB a rank, 325 ms: no decode bears it. Whole prompts from 2k (dense) and 16k (MoE,
  which gathers all experts) on cover it, and as nothing else is exchanged, DP 8 with FSDP makes the most prompt tokens: 42,800/s, TP 8
  20,200.
- **DP, as many replicas as fit**, once there are sequences for all.

So prefill and decode want different shapes, prefill workers FSDP, PP or CP, decode workers TP
(dense) or DP with EP (experts). That is what pages between any two grids (`worker/ship/grid_plan.h`) are for.
"""

TEXT = """# Where each parallel mode pays

Written by `python tests/bench/scale.py`: arithmetic, no measurement on GPUs of more than one rank. The same functions predict this
machine's figures, which are measured (last section). bf16 weights and KV; times in ms.

Figures of a rank: H200, memory 4.3 TB/s of 4.8, products 750 TFLOP/s, 130 of 141 GB for weights and KV, 13 us a layer between
kernels. In a node (8 ranks) NVLink, 370 GB/s received and 6 us an exchange; between nodes 45 GB/s of 400 Gb/s InfiniBand and 15 us;
experts 198 GB/s + 40 us in a node, 52 GB/s + 32 us beyond (sources: scale.py). A layer takes

    max(weights / memory, operations / products) + max(keys and values / memory, operations / products) + between kernels + exchanges

and what is exchanged is what `worker/model` does: TP: two sums a layer as f32 parts, whole rows [T, E] from every rank below
`BLOCK_FLOATS`, else blocks there and back; CP: new keys, and the cheaper of keys round the ring and queries with their parts;
EP: rows to their experts and back; FSDP: the layer's other parts, hidden behind the layer before as far as it lasts; PP: f32 rows to
the next stage. Nothing else overlaps. Prompts are cut for PP as `worker/sched.c` does.

## One mode at a time, 8 ranks

A cell: ms a token (decode: batch x context over all replicas) or to the first token (prompt) / tokens/s of the 8. "no room":
weights and KV of that many tokens do not fit.

{{dense_name}}

{{dense_modes}}

{{moe_name}}

{{moe_modes}}

## Parts of a layer's time

{{dense_terms}}

{{moe_terms}}

## The best shapes

Of all factorizations of 8 and 64 into TP (to 16) x PP x CP (to 8) x DP, with EP and FSDP where allowed.

{{bests}}

## What follows

{{conclusions}}

## Checked on this machine

`python tests/bench/ranks.py` measures two ranks of one thread against one process of two threads on the 1b shape; the load was {{load}}
on 2 cores. The model gets the limits measured in those runs (reading, multiply-add; two ranks share them) and coll.json's exchange:
its other constants are 0 here. By the clock the figures are what the scheduler left of them; processor time is that of the rank that
used most.

{{check}}

The weights' stream and the products are nearly all of it: TP's and PP's exchanges are at most 2 % of a step here (an exchange takes
{{exchange_us}} us, 1 MiB at {{rate}} GB/s), and by processor time the model is within 6 % of the ratios of TP's prefill and batch of 8, and of chunks. In decode of
one sequence, where TP's ratio is 1.22, and in PP's decode two ranks beat the two threads of one process, which wait for each other after
each product. By the clock other work on the machine takes turns with the ranks. Fully sharded, the cores that compute also copy each layer in and out of shared memory, so nothing hides it, and a layer
of 122 MB comes at about 3 GB/s where coll.json's figure is for 1 MiB in cache: FSDP is not for ranks that share a memory.
Nearest to its goal of 0.9 is a long prompt in PP stages: of 16 layers the last computes only keys and values until the prompt's last
rows, so two stages of 8 layers are 6 % uneven, and 32 steps of 64 rows leave one step of 33 idle: 0.92 here, and less beside other work.
With AMX, whose tiles want 256 rows a step, eight steps leave one of nine idle: 0.89 at most, 0.88 measured (README.md), below the goal.
"""


def main():
    rows, measured = check()
    loads = sorted(x for e in measured.values() for x in e["load"])
    us = load("coll.json")["mpi"]["us"]
    notes = TEXT
    parts = {
        "check": "\n".join(rows),
        "load": f"{loads[0]:.0f} to {loads[-1]:.0f}",
        "dense_modes": "\n".join(modes_table(DENSE, 8, ((1, 8192), (32, 8192), (256, 8192)), (
            Shape(tp=2), Shape(tp=4), Shape(tp=8), Shape(pp=2), Shape(pp=4), Shape(pp=8), Shape(tp=4, cp=2), Shape(tp=2, cp=4), Shape(tp=2, pp=4), Shape(fsdp=True), Shape(tp=4, fsdp=True)))),
        "moe_modes": "\n".join(modes_table(MOE, 8, ((1, 8192), (32, 8192), (256, 8192)), (
            Shape(tp=8), Shape(tp=4, pp=2), Shape(pp=8), Shape(tp=1, ep=True), Shape(tp=2, ep=True), Shape(tp=4, ep=True), Shape(tp=8, ep=True), Shape(cp=8, ep=True), Shape(fsdp=True)))),
        "dense_terms": "\n".join(terms_table(DENSE, ((Shape(tp=8), 1, 8192), (Shape(tp=8), 64, 8192), (Shape(tp=16), 64, 8192), (Shape(pp=8), 8, 8192), (Shape(tp=8, cp=8), 1, 1048576), (Shape(dp=8, fsdp=True), 32, 8192)))),
        "moe_terms": "\n".join(terms_table(MOE, ((Shape(tp=8), 64, 8192), (Shape(dp=8, ep=True), 8, 8192), (Shape(dp=64, ep=True), 32, 4096), (Shape(tp=8, dp=8, ep=True), 64, 8192)))),
    }
    bests = []
    for n in (8, 64):
        for d in (DENSE, MOE):
            bests += [f"{d.name}, {n} H200, decode", "", *decode_table(d, n), "", f"{d.name}, {n} H200, prefill", "", *prefill_table(d, n), ""]
    parts["bests"] = "\n".join(bests).rstrip()
    parts["dense_name"], parts["moe_name"] = (f"{d.name}: {d.weights() / 1e9:.0f} billion weights, {d.L} layers" for d in (DENSE, MOE))
    parts["exchange_us"], parts["rate"] = f"{us['exchange']:.2f}", f"{1.048576e3 / us['gather']:.0f}"
    parts["conclusions"] = CONCLUSIONS.strip()
    for k, v in parts.items():
        notes = notes.replace("{{" + k + "}}", v)
    assert "{{" not in notes, notes[notes.index("{{"):][:60]
    with open(os.path.join(HERE, "scale.md"), "w") as f:
        f.write(notes)


if __name__ == "__main__":
    main()
