"""Model directories for tests of the API: the checkpoints of tests/golden with a tokenizer.
SPDX-License-Identifier: Apache-2.0
"""
import contextlib
import json
import os
import shutil
import tempfile

from support.cluster import DEMO, ROOT


@contextlib.contextmanager
def with_tokenizer(name):
    """A checkpoint of tests/golden/models with the demo model's tokenizer, cut to its vocabulary."""
    source = os.path.join(ROOT, "tests", "golden", "models", name)
    d = tempfile.mkdtemp(prefix="td", dir="/tmp")
    try:
        for f in os.listdir(source):
            if f != "golden.safetensors":
                os.symlink(os.path.join(source, f), os.path.join(d, f))
        with open(os.path.join(source, "config.json")) as f:
            size = json.load(f)["vocab_size"]
        with open(os.path.join(DEMO, "tokenizer.json")) as f:
            t = json.load(f)
        bpe = t["model"]
        bpe["vocab"] = {k: v for k, v in bpe["vocab"].items() if v < size}

        def halves(m):
            return m if isinstance(m, list) else m.split(" ")

        bpe["merges"] = [m for m in bpe["merges"] if {*halves(m), "".join(halves(m))} <= set(bpe["vocab"])]
        with open(os.path.join(d, "tokenizer.json"), "w") as f:
            json.dump(t, f)
        for f in os.listdir(DEMO):
            if f.startswith(("tokenizer_config", "chat_template")) and not os.path.exists(os.path.join(d, f)):
                shutil.copy(os.path.join(DEMO, f), d)
        yield d
    finally:
        shutil.rmtree(d)
