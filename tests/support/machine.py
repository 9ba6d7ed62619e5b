"""What tests need of a machine that other tests, and other people's work, use at the same time.
SPDX-License-Identifier: Apache-2.0
"""
import fcntl
import os
import random
import socket
import tempfile

_ports = []  # locks of the ports that this process took


def patience(seconds):
    """A deadline: as many times longer as processes want each core."""
    return seconds * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def free_port():
    """A port that no other test takes while this process lives, whether anything listens on it or not: below those that the
    kernel gives to whoever asks for any, so that nothing else takes it by chance either."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as f:
        end = min(int(f.read().split()[0]), 65536)
    folder = os.path.join(tempfile.gettempdir(), f"tandem-test-ports.{os.geteuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    for port in random.SystemRandom().sample(range(min(10000, end - 1), end), k=min(2000, end - min(10000, end - 1))):
        lock = open(os.path.join(folder, str(port)), "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the programs do
                s.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _ports.append(lock)
        return port
    raise OSError(f"no free port below {end}")
