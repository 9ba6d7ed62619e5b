"""stories260K, a real trained checkpoint (f32, head dimension 8, SentencePiece-style vocabulary), served: its
published greedy text.
SPDX-License-Identifier: Apache-2.0
"""
import os
import re

from support.cluster import SHARED, Cluster, skip

MODEL = os.path.join(SHARED, "data", "stories260K")
if not os.path.exists(MODEL):
    skip("../shared/data is not here")
text = open(os.path.join(MODEL, "stories260K.md")).read()
want = re.search(r"-t 0\.0\n(.*?)\n```", text, re.S).group(1)
for ops in ("ref",
            "auto"):  # auto finds that the fast families do not take a head dimension of 8, and uses ref
    with Cluster(MODEL, name="stories", extra=["--ops", ops]) as c:
        r = c.complete([1], max_tokens=500, temperature=0)  # BOS alone, as the published run
        got = r["choices"][0]["text"]
        n = len(os.path.commonprefix([got.strip(), want.strip()]))
        print(f"{ops}: {n} of {len(want.strip())} characters equal", flush=True)
        assert got.strip().startswith(want.strip()), (got[n:n + 80], want[n:n + 80])
        c.wait_clean()
print("2 passed, 0 failed")
