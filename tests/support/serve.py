"""`tandem serve` for tests, with the calls of support.cluster.

    with Serve("--mixed", "2", "--mixed-ranks", "2") as c: c.complete(...)
SPDX-License-Identifier: Apache-2.0
"""
import os
import tempfile

from support.cluster import BUILD, DEMO, Cluster, free_port


class Serve(Cluster):
    def __init__(self, *args, model=DEMO, name="demo", ready=True, prefill=0, decode=0, tls=None):
        self.dir = tempfile.mkdtemp(prefix="td", dir="/tmp")
        self.port, self.grpc_port, self.name, self.model = free_port(), free_port(), name, model
        self.procs, self.workers, self.tls = {}, [], tls
        argv = ["tandem", "serve", model, "--served-model-name", name, "--port", str(self.port)]
        argv += ["--grpc-port", str(self.grpc_port), "--prefill", str(prefill), "--decode", str(decode)]
        self._spawn("serve", [*argv, "--cache-dir", os.path.join(BUILD, "test-cache"), *args])
        if ready:
            self.wait_ready()
