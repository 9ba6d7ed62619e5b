"""`tandem logits` on every golden checkpoint of the served architectures, against the recorded logits; whole and in chunks of 7.

ref: max |error| <= 1e-4 * max |logit|. Fast: max |error| over a checkpoint's cases <= its err_bf16 (what transformers in bf16 makes), KL <= 2e-3.
Mixtures of experts: rounding flips near ties of the router, a flip changes its row by as much as two experts differ and every later row a little
(transformers in bf16: 1.2 of the largest logit), so a limit for all rows would see nothing. Of each case the rows before the first that is off count, by
the limit of dense models; and where that one is, the router must be near a tie (tests/worker/test_moe.c: the same by the routes themselves, and all rows with
the routes held still). Whole and in chunks: the same bits.
SPDX-License-Identifier: Apache-2.0
"""
import os
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

from support.cluster import BIN, ROOT, SHARED, skip
from support.moe_reference import Model

MODELS = os.path.join(ROOT, "tests", "golden", "models")
if not os.path.isdir(MODELS):
    MODELS = os.path.join(SHARED, "goldens", "models")
if not os.path.isdir(MODELS):
    skip("no goldens")
NAMES = ("llama-gqa llama-gqa-v4 llama-mha-tied llama-mqa llama3-rope llama3-rope-v4 llama-yarn llama-yarn-v4 llama-linear llama-linear-v4 llama-f16 llama-bias "
         "mistral-swa ministral3 qwen2 qwen3 mixtral qwen3-moe").split()
MOE = ("mixtral", "qwen3-moe")
DENSE = 0.05  # as in test_moe.c


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def until_tie(name, ties, want, got, largest):
    """Rows before the first one that is off, which must be near a tie: two logits of the router, each as exact as a dense model's."""
    off = np.abs(got - want).max(-1) > DENSE * largest
    if not off.any():
        return len(off)
    t = int(off.argmax())
    assert ties[t] <= 2 * DENSE, f"{name}: row {t} of {len(off)} is off, and the router's margin there is {ties[t]:.3f}"
    return t


failed = 0
tmp = tempfile.mkdtemp()
for name in NAMES:
    folder = os.path.join(MODELS, name)
    g = load_file(os.path.join(folder, "golden.safetensors"))
    ids = {k: v for k, v in g.items() if k.startswith("ids_")}
    save_file(ids, f"{tmp}/ids.safetensors")
    ties, whole, largest = {}, {}, max(np.abs(v).max() for k, v in g.items() if k.startswith("logits_"))
    if name in MOE:
        oracle = Model(folder)
        for k in ids:
            logits, routers = oracle.forward(g[k])
            assert np.abs(logits - g["logits_" + k[4:]]).max() <= 1e-5 * np.abs(logits).max(), (name, k)
            ties[k] = oracle.margins(routers)
    for ops, extra in (("ref", []), ("ref", ["--chunk", "7", "--page-size", "8"]), ("auto", []), ("auto", ["--chunk", "7", "--page-size", "8"])):
        argv = [f"{BIN}/tandem", "logits", folder, "--ids", f"{tmp}/ids.safetensors", "--out", f"{tmp}/out.safetensors", "--ops", ops, "--no-pack-cache", *extra]
        r = subprocess.run(argv, capture_output=True, text=True)
        if r.returncode:
            print(f"{name} {ops}: status {r.returncode}: {r.stderr[-400:]}")
            failed += 1
            continue
        out = load_file(f"{tmp}/out.safetensors")
        err, kl, rows = 0.0, [], 0
        for k in ids:
            want, got = g["logits_" + k[4:]], out["logits_" + k[4:]]
            assert got.shape == want.shape and got.dtype == np.float32
            assert whole.setdefault((ops, k), got.tobytes()) == got.tobytes(), f"{name} {ops} {k}: in chunks it differs"
            if ties and ops != "ref":
                n = until_tie(name, ties[k], want, got, largest)
                want, got = want[:n], got[:n]
                if not n:
                    continue
            rows += len(want)
            err = max(err, float(np.abs(got - want).max() / (largest if ties else np.abs(want).max())))
            a, b = log_softmax(want), log_softmax(got)
            kl.append(float((np.exp(a) * (a - b)).sum(-1).mean()))
        limit, kl_limit = (1e-4, 1e-8) if ops == "ref" else (float(g["err_bf16"][0]), 2e-3)
        if name in MOE and ops != "ref":
            limit = min(limit, DENSE)
        good = err <= limit and max(kl) <= kl_limit  # of each case
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {name:16} {ops:5} {' '.join(extra):24} error {err:.2e} (limit {limit:.2e}) KL {max(kl):.2e} {rows} rows", flush=True)
print(f"{len(NAMES) * 4 - failed} passed, {failed} failed")
sys.exit(failed != 0)
