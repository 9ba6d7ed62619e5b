#!/usr/bin/env python3
"""Stand-ins for srun and scontrol: steps of a job on this host, whose nodes are addresses of the loopback.

    install(DIR) -> the directory to put before PATH; then every srun appends a line to DIR/steps:
    {"node": .., "argv": [..], "pid": ..}

As srun: a task in a session of its own, signals passed on to it, its status given back.
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import signal
import subprocess
import sys


def install(d):
    for name in "srun", "scontrol":
        path = os.path.join(d, name)
        with open(path, "w") as f:
            f.write(f'#!/bin/sh\nexec {sys.executable} {os.path.abspath(__file__)} {d} {name} "$@"\n')
        os.chmod(path, 0o755)
    return d


def steps(d):
    with open(os.path.join(d, "steps")) as f:
        return [json.loads(line) for line in f]


def refuse(what):
    sys.exit(f"stand-in of srun and scontrol: {what}")


def scontrol(args):
    if args[:2] != ["show", "hostnames"] or len(args) != 3:
        refuse(args)
    print(*args[2].split(","), sep="\n")


def srun(d, args):
    node, known = None, ["--nodes=1", "--ntasks=1", "--overlap", "--kill-on-bad-exit=0", "--cpu-bind=none"]
    while args and args[0].startswith("--"):
        a = args.pop(0)
        if a.startswith("--nodelist="):
            node = a.split("=", 1)[1]
        elif a in known:
            known.remove(a)
        else:
            refuse(a)
    if node not in os.environ["SLURM_JOB_NODELIST"].split(",") or known or not args:
        refuse(f"node {node}, without {known}: {args}")
    if os.environ.get("SLURM_OVERLAP") != "1":
        refuse("steps that share a node wait for each other without SLURM_OVERLAP=1")
    caught = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, caught)  # none is lost before there is a task
    env = dict(os.environ, SLURM_STEP_ID="0", SLURM_PROCID="0", SLURM_NTASKS="1", SLURMD_NODENAME=node)
    task = subprocess.Popen(args, env=env, start_new_session=True,
                            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, caught))
    for s in caught:
        signal.signal(s, lambda n, _: task.send_signal(n))
    with open(os.path.join(d, "steps"), "a") as f:
        f.write(json.dumps({"node": node, "argv": args, "pid": task.pid}) + "\n")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
    r = task.wait()
    sys.exit(128 - r if r < 0 else r)


if __name__ == "__main__":
    d, name, *args = sys.argv[1:]
    scontrol(args) if name == "scontrol" else srun(d, args)
