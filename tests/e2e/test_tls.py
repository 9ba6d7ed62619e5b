"""TLS on both ports: the openai client, grpcio and `tandem chat` as they are, ALPN, certificates of clients, files that
are wrong.
SPDX-License-Identifier: Apache-2.0
"""
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile

import grpc
import httpx2
import openai
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.cluster import BIN, DEMO, Cluster, questions, skip
from support.machine import patience
from support.report import done, ok
from support.serve import Serve


def make_cert(d, name, *more):
    subprocess.run([
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", f"/CN={name}", "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", f"{d}/{name}.key", "-out", f"{d}/{name}.crt",
        *(more or ["-nodes"])
    ], check=True, capture_output=True)


def alpn(port, ca, *offered):
    """(protocol chosen, TLS version); an error text when the handshake fails."""
    x = ssl.create_default_context(cafile=ca)
    x.set_alpn_protocols(offered)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=patience(20)) as k:
            with x.wrap_socket(k, server_hostname="localhost") as s:
                return s.selected_alpn_protocol(), s.version()
    except ssl.SSLError as e:
        return str(e)


def plain_is_refused(port):
    with socket.create_connection(("127.0.0.1", port), timeout=patience(20)) as k:
        k.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        try:
            return not k.recv(100).startswith(b"HTTP")
        except OSError:
            return True


def clients(d):
    q = next(q for q in questions() if q["task"] == "add" and q["right"])
    ca = f"{d}/server.crt"
    with Serve("--tls-cert", ca, "--tls-key", f"{d}/server.key", prefill=1, decode=1,
               tls=ssl.create_default_context(cafile=ca)) as c:
        c.until("both workers", 30, lambda: [w["state"] for w in c.ledger()["workers"]] == ["READY"] * 2)
        ids = c.complete(q["prompt_ids"], temperature=0, max_tokens=100)["choices"][0]["token_ids"]
        assert ids == q["answer_ids"], ids
        ok("completion over TLS")
        with httpx2.Client(verify=ssl.create_default_context(cafile=ca)) as http:
            client = openai.OpenAI(api_key="none", base_url=f"https://localhost:{c.port}/v1", http_client=http)
            s = client.chat.completions.create(model="demo", messages=q["messages"], temperature=0, stream=True)
            assert "".join(e.choices[0].delta.content or "" for e in s if e.choices) == q["answer"]
        ok("openai client, a stream")
        try:
            openai.OpenAI(api_key="none", base_url=f"https://localhost:{c.port}/v1", max_retries=0).models.list()
            raise AssertionError("a certificate that nobody vouches for was accepted")
        except openai.APIConnectionError:
            ok("a client that does not know the authority refuses")
        with open(ca, "rb") as f, grpc.secure_channel(f"localhost:{c.grpc_port}",
                                                      grpc.ssl_channel_credentials(f.read())) as ch:
            h = health_pb2_grpc.HealthStub(ch).Check(health_pb2.HealthCheckRequest(), timeout=patience(20))
            assert h.status == health_pb2.HealthCheckResponse.SERVING
        ok("grpcio")
        for port in c.port, c.grpc_port:
            assert alpn(port, ca, "h2", "http/1.1")[0] == "h2"
            assert alpn(port, ca, "http/1.1")[0] == "http/1.1"
            assert "no application protocol" in alpn(port, ca, "spdy/3").lower()
            assert plain_is_refused(port)
        ok("ALPN: h2 before http/1.1, nothing else; no plain HTTP")
        chat = [os.path.join(BIN, "tandem"), "chat", "--url", f"https://localhost:{c.port}", "--temperature", "0"]
        r = subprocess.run([*chat, "--tls-ca", ca, "-p", q["messages"][-1]["content"]], capture_output=True, text=True,
                           timeout=patience(60))
        assert r.returncode == 0 and r.stdout.strip(), r
        r = subprocess.run([*chat, "-p", "x"], capture_output=True, text=True, timeout=patience(60))
        assert r.returncode and "certificate" in r.stderr, r
        ok("tandem chat, with the authority and without")
        assert "on https://" in c.log("serve")
        c.wait_clean()


def client_certificates(d):
    known = ssl.create_default_context(cafile=f"{d}/server.crt")
    known.load_cert_chain(f"{d}/client.crt", f"{d}/client.key")
    args = ["--tls-cert", f"{d}/server.crt", "--tls-key", f"{d}/server.key", "--tls-client-ca", f"{d}/client.crt"]
    with Cluster(prefill=0, decode=0, router_extra=args, ready=False, tls=known) as c:
        c.until("alive", 20, lambda: c.get("/livez", 5) is not None)
        c.tls = ssl.create_default_context(cafile=f"{d}/server.crt")
        try:
            c.get("/livez", 5)
            raise AssertionError("served without a certificate")
        except (ssl.SSLError, OSError) as e:
            ok(f"no certificate: {e}")


def refused(d):
    """What is wrong with the files is said at start, with the file's name, and nothing listens."""
    with open(f"{d}/garbage", "w") as f:
        f.write("no certificate\n")
    crt, key = f"{d}/server.crt", f"{d}/server.key"
    for args, words in ((["--tls-cert", crt], ["--tls-cert needs"]), (["--tls-key", key], ["--tls-key needs"]),
                        (["--tls-client-ca", crt], ["--tls-client-ca needs"]),
                        (["--tls-cert", f"{d}/none", "--tls-key", key], [f"{d}/none", "No such file"]),
                        (["--tls-cert", f"{d}/garbage", "--tls-key", key], [f"{d}/garbage", "no start line"]),
                        (["--tls-cert", crt, "--tls-key", f"{d}/none"], [f"{d}/none", "No such file"]),
                        (["--tls-cert", crt, "--tls-key", f"{d}/client.key"], [f"{d}/client.key", "mismatch"]),
                        (["--tls-cert", f"{d}/locked.crt", "--tls-key", f"{d}/locked.key"], [f"{d}/locked.key", "passphrase"]),
                        (["--tls-cert", crt, "--tls-key", key, "--tls-client-ca", f"{d}/garbage"], [f"{d}/garbage"])):
        for program in (["tandem-router", "--model", DEMO, "--router-bind", f"ipc://{d}/control"],
                        ["tandem", "serve", DEMO]):
            r = subprocess.run([os.path.join(BIN, program[0]), *program[1:], "--port", "0", "--grpc-port", "0", *args],
                               capture_output=True, text=True, timeout=patience(60), stdin=subprocess.DEVNULL)
            assert r.returncode and all(w in r.stderr for w in words), (program, args, r)
    ok("wrong files are refused by name, by tandem-router and by tandem serve")


if not shutil.which("openssl"):
    skip("no openssl")
with tempfile.TemporaryDirectory() as d:
    make_cert(d, "server")
    make_cert(d, "client")
    make_cert(d, "locked", "-passout", "pass:1234")
    clients(d)
    client_certificates(d)
    refused(d)
done()
sys.exit(0)
