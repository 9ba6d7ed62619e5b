"""What the hand-off costs, and how fast a cluster starts.

    python tests/bench/handoff.py [--rounds 7] [--shape 1b] [--only start|handoff|grid] [--alone]

start:   from exec of `tandem serve` on the demo model (built, page cache warm) to the first streamed byte of a request sent at once: < 1 s.
handoff: time to the second token, disaggregated minus mixed, on an idle machine, 512 and 2,048 tokens of the shape: <= 5 % of TTFT;
         transfer_exposed_ms <= 10 % of transfer_ms. (second_token_ms counts from the first token, which the prefill worker sends at once.) Interleaved: one request to each cluster in turn.
grid:    the KV of a 2,048-token prompt of the 1b shape from one rank to two (TP 2) over ipc and loopback tcp, against the sockets alone in the same run: the same
         links, threads and frames, sent as they lie in the pages and dropped on arrival. MB/s, ratio of alternating rounds and of the best of each (>= 0.85 is the goal),
         CPU time of both sides (middle and least). "placed": the sockets and one memcpy on arrival to where the bytes are to stay, the least that any receiver over ZeroMQ does. Then with layers that take 4 times as long to compute as to ship, a core busy with them: from the end of the last to the
         landing of the last rank, <= 5 % of the shipping time.
         --alone: all of it under a real-time policy (chrt -f; needs the right to), so that other processes of a shared machine take neither core; the results are kept beside
         those of a quiet machine (tcp_alone, ipc_alone), because without competition the sockets alone use both cores too.
SPDX-License-Identifier: Apache-2.0
"""
import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time

from common import RESULTS, save

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from support.cluster import BIN, DEMO, ROOT, Cluster, free_port  # noqa: E402

p = argparse.ArgumentParser()
p.add_argument("--rounds", type=int, default=7)
p.add_argument("--dir", default=os.path.join(ROOT, "build", "bench", "1b"))
p.add_argument("--only", choices=["start", "handoff", "grid"])
p.add_argument("--alone", action="store_true")
p.add_argument("--out", default=RESULTS)
a = p.parse_args()
report = {"date": time.strftime("%Y-%m-%d"), "command": "python tests/bench/handoff.py --rounds %d" % a.rounds}


def first_byte(port):
    body = json.dumps({"model": "demo", "stream": True, "max_tokens": 8, "messages": [{"role": "user", "content": "Add 770 and 605."}]})
    while True:
        try:
            h = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            h.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            r = h.getresponse()
            while True:  # the first event that carries text
                line = r.readline()
                if not line:
                    raise SystemExit("the stream ended without text")
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    return
        except ConnectionRefusedError:
            time.sleep(0.002)


def add(name, new):
    path = os.path.join(a.out, name)
    old = json.load(open(path)) if os.path.exists(path) else {}
    save(a.out, name, {**old, **new})


if a.only == "grid":
    tool = os.path.join(os.path.dirname(BIN), "tests", "ship_test_grid_speed")
    how = {"date": time.strftime("%Y-%m-%d"), "command": "python tests/bench/handoff.py --only grid --rounds %d%s" % (a.rounds, " --alone" * a.alone), "cores": os.cpu_count(),
           "load_before": os.getloadavg()[0], "tcp_congestion_control": open("/proc/sys/net/ipv4/tcp_congestion_control").read().strip()}
    grid = {"alone": how} if a.alone else how
    for transport in ("tcp", "ipc"):
        r = json.loads(subprocess.run(["chrt", "-f", "5"] * a.alone + [tool, str(a.rounds), "2048", "1b", transport], stdout=subprocess.PIPE, check=True, text=True).stdout)
        grid[transport + "_alone" * a.alone] = r
        print("{transport}: {ship_mb_s} MB/s of {raw_mb_s}: {ratio}; best of {rounds}: {ship_best_mb_s} of {raw_best_mb_s}: {best_ratio}; of placed {placed_mb_s}: {placed_ratio}; "
              "CPU {ship_cpu_ms} against {raw_cpu_ms} (placed {placed_cpu_ms}) ms, least {ship_least_cpu_ms} against {raw_least_cpu_ms} ({placed_least_cpu_ms}); exposed {exposed_ms} ms = {exposed_of_shipping} of shipping".format(**r))
    add("ship_grid.json", grid)
    sys.exit(0)

if a.only != "handoff":
    times = []
    for i in range(a.rounds + 1):
        port = free_port()
        t = time.monotonic()
        s = subprocess.Popen([os.path.join(BIN, "tandem"), "serve", DEMO, "--served-model-name", "demo", "--port", str(port), "--grpc-port", "0", "--log-level", "warn"],
                             stdout=subprocess.DEVNULL)
        first_byte(port)
        times.append(time.monotonic() - t)
        s.terminate()
        s.wait()
    times = times[1:]  # the first one packs the weights
    report["start_s"] = {"median": round(statistics.median(times), 3), "max": round(max(times), 3)}
    print(f"exec of tandem serve to the first streamed byte: median {statistics.median(times):.3f} s, max {max(times):.3f} s of {a.rounds}")

if a.only != "start":
    extra = ["--max-model-len", "4096", "--kv-memory", "512M", "--no-prefix-cache", "--threads", "2"]
    with Cluster(a.dir, prefill=1, decode=1, name="m", extra=extra, threads=2, ready=False) as dis, \
            Cluster(a.dir, prefill=0, decode=0, mixed=1, name="m", extra=extra, threads=2, ready=False) as mix:
        dis.wait_ready(300)
        mix.wait_ready(300)
        for n in (512, 2048):
            rows = {"dis": [], "mix": []}
            for r in range(a.rounds + 1):
                ids = [(r * 7919 + i * 104729) % 100000 + 100 for i in range(n)]
                for name, c in (("mix", mix), ("dis", dis)):
                    rows[name].append(c.complete(ids, max_tokens=8, temperature=0, ignore_eos=True)["timings"])
            med = {k: {f: statistics.median(x[f] or 0 for x in v[1:]) for f in ("ttft_ms", "second_token_ms", "prefill_ms", "transfer_ms", "transfer_exposed_ms", "kv_bytes_shipped")}
                   for k, v in rows.items()}
            extra_ms = statistics.median(d["second_token_ms"] - m["second_token_ms"] for d, m in zip(rows["dis"][1:], rows["mix"][1:]))
            share = extra_ms / med["mix"]["ttft_ms"]
            exposed = med["dis"]["transfer_exposed_ms"] / max(med["dis"]["transfer_ms"], 1e-9)
            report[f"handoff_{n}"] = {"disaggregated": med["dis"], "mixed": med["mix"], "second_token_extra_ms": round(extra_ms, 2), "of_ttft": round(share, 4), "exposed_of_transfer": round(exposed, 4)}
            print(f"{n} tokens: second token {med['dis']['second_token_ms']:.1f} ms disaggregated, {med['mix']['second_token_ms']:.1f} ms mixed: {extra_ms:+.1f} ms = {100 * share:.1f} % of TTFT; "
                  f"transfer {med['dis']['transfer_ms']:.1f} ms, exposed {med['dis']['transfer_exposed_ms']:.1f} ms = {100 * exposed:.1f} %")
add("handoff.json", report)
