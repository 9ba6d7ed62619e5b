"""Network namespaces joined by a bridge: hosts with addresses of their own on one machine (root only).

    with Hosts(3) as h:  h.address(1), h.outside (this side's address), h.inside(1, argv) -> argv,
                         h.link(2, up=False)

MPI starts its daemons on them through h.agent (mpirun's plm_rsh_agent). A host's name is its address: no
table of names.
SPDX-License-Identifier: Apache-2.0
"""
import os
import shutil
import subprocess
import tempfile

AGENT = """#!/bin/bash
# HOST COMMAND: as ssh, without its environment, for the addresses of these namespaces
host=$1; shift
exec env -i PATH="$PATH" HOME="$HOME" ip netns exec {name}h${{host##*.}} \\
  unshare -u bash -c 'hostname "$0"; exec bash -c "$*"' "$host" "$@"
"""


def run(*argv, check=True):
    return subprocess.run(argv, check=check, capture_output=True, text=True)


def missing():
    """Why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "hostname"):
        if not shutil.which(tool):
            return f"no {tool}"
    name = f"tdp{os.getpid()}"
    if run("ip", "netns", "add", name, check=False).returncode:
        return "network namespaces are not permitted here"
    bridge = run("ip", "link", "add", f"b{os.getpid()}", "type", "bridge", check=False)
    run("ip", "link", "del", f"b{os.getpid()}", check=False)
    run("ip", "netns", "del", name)
    return "no bridges here" if bridge.returncode else None


class Hosts:
    def __init__(self, n):
        self.name = f"td{os.getpid()}"
        self.net = f"10.{64 + os.getpid() % 128}.{os.getpid() // 128 % 256}"
        self.outside, self.subnet, self.n = f"{self.net}.254", f"{self.net}.0/24", n
        self.dir = tempfile.mkdtemp(prefix="tdn")
        self.agent = os.path.join(self.dir, "agent")
        with open(self.agent, "w") as f:
            f.write(AGENT.format(name=self.name))
        os.chmod(self.agent, 0o755)

    def address(self, i):
        return f"{self.net}.{i}"

    def __enter__(self):
        run("ip", "link", "add", self.name + "b", "type", "bridge")
        run("ip", "addr", "add", f"{self.outside}/24", "dev", self.name + "b")
        run("ip", "link", "set", self.name + "b", "up")
        for i in range(1, self.n + 1):
            ns, veth = f"{self.name}h{i}", f"{self.name}v{i}"
            run("ip", "netns", "add", ns)
            run("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", ns)
            run("ip", "link", "set", veth, "master", self.name + "b", "up")
            run("ip", "-n", ns, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            run("ip", "-n", ns, "link", "set", "eth0", "up")
            run("ip", "-n", ns, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for i in range(1, self.n + 1):
            run("ip", "link", "del", f"{self.name}v{i}", check=False)
            run("ip", "netns", "del", f"{self.name}h{i}", check=False)
        run("ip", "link", "del", self.name + "b", check=False)
        shutil.rmtree(self.dir)

    def inside(self, i, argv):
        return [
            shutil.which("ip"), "netns", "exec", f"{self.name}h{i}", "unshare", "-u", "bash", "-c",
            'hostname "$0"; exec "$@"',
            self.address(i), *argv
        ]

    def link(self, i, up):
        run("ip", "link", "set", f"{self.name}v{i}", "up" if up else "down")

    def received(self, i):
        """Bytes that came in over the host's link."""
        out = run("ip", "netns", "exec", f"{self.name}h{i}", "cat", "/sys/class/net/eth0/statistics/rx_bytes")
        return int(out.stdout)
