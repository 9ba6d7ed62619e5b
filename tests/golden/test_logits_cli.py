"""`tandem logits` on every golden checkpoint of the served architectures, against the recorded logits; whole and in chunks of 7.

ref: max |error| <= 1e-4 * max |logit|. Fast: max |error| over a checkpoint's cases <= its err_bf16 (what transformers in bf16 makes), KL <= 2e-3.
Mixtures of experts: rounding flips near ties of the router, and a flip changes a row by as much as two experts differ, in transformers' bf16 too: which
ties flip decides the largest error, so it may be 1.25 x err_bf16, and KL as large as theirs (tests/worker/test_moe.c holds the routes still).
SPDX-License-Identifier: Apache-2.0
"""
import os
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

from support.cluster import BIN, ROOT, SHARED, skip

MODELS = os.path.join(ROOT, "tests", "golden", "models")
if not os.path.isdir(MODELS):
    MODELS = os.path.join(SHARED, "goldens", "models")
if not os.path.isdir(MODELS):
    skip("no goldens")
NAMES = ("llama-gqa llama-gqa-v4 llama-mha-tied llama-mqa llama3-rope llama3-rope-v4 llama-yarn llama-yarn-v4 llama-linear llama-linear-v4 llama-f16 llama-bias "
         "mistral-swa ministral3 qwen2 qwen3 mixtral qwen3-moe").split()
MOE = ("mixtral", "qwen3-moe")


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


failed = 0
tmp = tempfile.mkdtemp()
for name in NAMES:
    folder = os.path.join(MODELS, name)
    g = load_file(os.path.join(folder, "golden.safetensors"))
    ids = {k: v for k, v in g.items() if k.startswith("ids_")}
    save_file(ids, f"{tmp}/ids.safetensors")
    for ops, extra in (("ref", []), ("ref", ["--chunk", "7", "--page-size", "8"]), ("auto", []), ("auto", ["--chunk", "7", "--page-size", "8"])):
        argv = [f"{BIN}/tandem", "logits", folder, "--ids", f"{tmp}/ids.safetensors", "--out", f"{tmp}/out.safetensors", "--ops", ops, "--no-pack-cache", *extra]
        r = subprocess.run(argv, capture_output=True, text=True)
        if r.returncode:
            print(f"{name} {ops}: status {r.returncode}: {r.stderr[-400:]}")
            failed += 1
            continue
        out = load_file(f"{tmp}/out.safetensors")
        err, kl = 0.0, []
        for k in ids:
            want, got = g["logits_" + k[4:]], out["logits_" + k[4:]]
            assert got.shape == want.shape and got.dtype == np.float32
            err = max(err, float(np.abs(got - want).max() / np.abs(want).max()))
            a, b = log_softmax(want), log_softmax(got)
            kl.append(float((np.exp(a) * (a - b)).sum(-1).mean()))
        limit, kl_limit = (1e-4, 1e-8) if ops == "ref" else (float(g["err_bf16"][0]), 2e-3)
        if name in MOE and ops != "ref":
            limit, kl_limit = 1.25 * limit, max(kl_limit, float(g["kl_bf16"][0]))
        good = err <= limit and np.mean(kl) <= kl_limit
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {name:16} {ops:5} {' '.join(extra):24} error {err:.2e} (limit {limit:.2e}) KL {np.mean(kl):.2e}", flush=True)
print(f"{len(NAMES) * 4 - failed} passed, {failed} failed")
sys.exit(failed != 0)
