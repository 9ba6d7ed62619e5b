# SPDX-License-Identifier: Apache-2.0
"""HTTP/2 and gRPC of router/net, spoken to by grpcio, curl and hand-made frames; the server is
tests/net/tool_netserver.c."""
import gzip
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

import grpc

from support.machine import patience

BUILD = os.environ.get("TANDEM_BUILD", "build")
TOOL = os.path.join(BUILD, "tests", "tool_netserver")
failed = 0


def check(ok, *what):
    global failed
    if not ok:
        failed += 1
        print("failed:", *what, "line", sys._getframe(1).f_lineno)


class Server:
    def __init__(self, **options):
        self.p = subprocess.Popen([TOOL] + [f"{k}={v}" for k, v in options.items()], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        self.port, self.grpc_port = map(int, self.p.stdout.readline().split())

    def stop(self):
        self.p.stdin.close()
        out = self.p.stdout.read()
        check(self.p.wait(patience(30)) == 0, "exit status", self.p.returncode)
        return dict((k, int(v)) for k, v in (kv.split("=") for kv in out.split()))


class Client:
    def __init__(self, port, **options):
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{port}", options=list(options.items()) + [("grpc.use_local_subchannel_pool", 1)])

    def unary(self, method):
        return self.channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)

    def stream(self, method):
        return self.channel.unary_stream(method, request_serializer=bytes, response_deserializer=bytes)

    def lost(self):
        return int(self.unary("/t.T/Lost")(b"", timeout=patience(5)))


def status_of(call):
    try:
        call()
    except grpc.RpcError as e:
        return e.code(), e.details()
    return grpc.StatusCode.OK, ""


def wait(condition, what):
    end = time.time() + patience(5)
    while not condition() and time.time() < end:
        time.sleep(0.01)
    check(condition(), what)


def test_calls(s):
    c = Client(s.grpc_port)
    echo = c.unary("/t.T/Unary")
    for n in (0, 1, 5, 16384, 16385, 65536, 1_000_000, 3_000_000):
        m = os.urandom(n)
        check(echo(m, timeout=patience(20)) == m, "echo of", n)
    check(Client(s.port).unary("/t.T/Unary")(b"x", timeout=patience(5)) == b"x", "the other port")
    got = list(c.stream("/t.T/Gen")(b"5000 16 0", timeout=patience(30)))
    check([int(x.split()[0]) for x in got] == list(range(5000)), "stream order")
    check([len(x) for x in c.stream("/t.T/Gen")(b"3 3000000 0", timeout=patience(30))] == [3_000_000] * 3,
          "large messages")
    check(list(c.stream("/t.T/Gen")(b"0 16 0", timeout=patience(5))) == [], "empty stream")


def test_status(s):
    c = Client(s.grpc_port)
    S = grpc.StatusCode
    check(
        status_of(lambda: c.unary("/t.T/Nope")(b"", timeout=patience(5))) == (S.UNIMPLEMENTED,
                                                                    "no such method: 100 % ä"),
        "percent-encoding")
    check(status_of(lambda: c.unary("/x.X/Nope")(b"", timeout=patience(5)))[0] == S.UNIMPLEMENTED, "service")
    check(status_of(lambda: c.unary("/t.T/a/b")(b"", timeout=patience(5)))[0] == S.UNIMPLEMENTED, "path")
    check(
        status_of(lambda: c.unary("/t.T/Fail")(b"8 too much", timeout=patience(5))) == (S.RESOURCE_EXHAUSTED,
                                                                              "too much"), "fail")
    code, text = status_of(
        lambda: c.channel.unary_unary("/t.T/Unary", request_serializer=bytes, response_deserializer=bytes)
        (b"x" * 1000, timeout=patience(5), compression=grpc.Compression.Gzip))
    check(code == S.UNIMPLEMENTED and "compress" in text, "gzip", code, text)
    code, text = status_of(lambda: c.channel.stream_unary(
        "/t.T/Unary", request_serializer=bytes, response_deserializer=bytes)(iter([b"a", b"b"]), timeout=patience(5)))
    check(code == S.UNIMPLEMENTED, "two request messages", code, text)
    code, text = status_of(lambda: c.channel.stream_unary("/t.T/Unary", request_serializer=bytes,
                                                          response_deserializer=bytes)(iter([]), timeout=patience(5)))
    check(code == S.INTERNAL, "no request message", code, text)
    code, text = status_of(lambda: c.unary("/t.T/Unary")(b"x" * 9_000_000, timeout=patience(20)))
    check(code == S.RESOURCE_EXHAUSTED and "large" in text, "oversize", code, text)
    code, text = status_of(lambda: c.unary("/t.T/Unary")(b"x", timeout=patience(5), metadata=[("big", "v" * 40000)]))
    check(code == S.RESOURCE_EXHAUSTED, "header list", code, text)
    check(c.unary("/t.T/Unary")(b"still", timeout=patience(5)) == b"still", "the connection survives all of it")


def test_deadline(s):
    c = Client(s.grpc_port)
    n = 0
    for method, message in (("Hang", b""), ("Gen", b"1000000 16 1000"), ("Gen", b"1000000 65000 0")):
        for _ in range(5):
            begin = time.time()
            code, _ = status_of(lambda: list(c.stream("/t.T/" + method)(message, timeout=0.15)))
            check(code == grpc.StatusCode.DEADLINE_EXCEEDED, method, code)
            check(0.1 < time.time() - begin < patience(3), "time", time.time() - begin)
            n += 1
    check(n == 15)


def test_deadline_slow_reader(s):
    """The client's own timer must not be what ends the call: raw frames, a window of 0, and only grpc-timeout
    on the wire."""
    r = Raw(s.grpc_port, window=0)
    r.grpc(1, "/t.T/Gen", b"1000000 1000 0", timeout="200m")
    frames = r.until(lambda f: f[0] == 1 and f[1] & 1)
    kinds = [f[0] for f in frames if f[2] == 1]
    check(kinds.count(1) == 2 and 0 not in kinds, "headers, trailers, no data", kinds)
    r.close()


def test_cancel(s):
    c = Client(s.grpc_port)
    before = c.lost()
    calls = [c.stream("/t.T/Gen")(b"1000000 16 1000")
             for _ in range(10)] + [c.stream("/t.T/Hang")(b"") for _ in range(10)]
    for it in calls[:10]:
        [next(it) for _ in range(3)]
    time.sleep(0.1)
    for it in calls:
        it.cancel()
    wait(lambda: c.lost() == before + 20, "cancels seen")
    c2 = Client(s.grpc_port)
    it = c2.stream("/t.T/Gen")(b"1000000 16 1000")
    next(it)
    c2.channel.close()  # the whole connection goes
    wait(lambda: c.lost() == before + 21, "connection loss seen")


def test_concurrent(s):
    c = Client(s.grpc_port)
    out = []

    def one(i):
        out.append(sum(1 for _ in c.stream("/t.T/Gen")(b"100 16 1000", timeout=patience(30))))
    threads = [threading.Thread(target=one, args=(i,)) for i in range(200)]
    begin = time.time()
    [t.start() for t in threads]
    [t.join() for t in threads]
    check(out == [100] * 200, "200 streams", set(out), len(out))
    check(time.time() - begin < patience(20), "time", time.time() - begin)


def test_slow_reader(s):
    c = Client(s.grpc_port)
    it = c.stream("/t.T/Gen")(b"3000 16000 0")
    next(it)
    time.sleep(1)
    check(1 + sum(1 for _ in it) == 3000, "all messages arrive late")


def test_curl(s):
    if not shutil.which("curl"):
        return

    def curl(*args):
        return subprocess.run(["curl", "-s", "--max-time", "20", *args], capture_output=True).stdout
    h2, url = "--http2-prior-knowledge", f"http://127.0.0.1:{s.port}"
    out = curl(h2, "-i", "-H", "Authorization: Bearer k", f"{url}/headers?q").decode()
    check(
        out.startswith("HTTP/2 200") and "GET /headers ? q auth=Bearer k host=127.0.0.1" in out
        and "h2=1" in out, out)
    check("content-type: text/plain" in out and "date: " in out and "content-length" in out, out)
    check(curl(h2, "--data-binary", "hello", f"{url}/echo") == b"hello", "echo")
    check(curl(h2, f"{url}/stream?3,8").decode().endswith("data: 2 xxxxxx\n\ndata: [DONE]\n\n"), "sse")
    check(len(curl(h2, f"{url}/big?5000000")) == 5_000_000, "big")
    check("HTTP/2 404" in curl(h2, "-i", f"{url}/nothing").decode(), "404")
    head = curl(h2, "-I", f"{url}/big?1234").decode()
    check("HTTP/2 200" in head and "content-length: 1234" in head, head)
    out = subprocess.run(["curl", "-s", "-i", h2, "--max-time", "20", "--data-binary", "@-", f"{url}/echo"],
                         input=b"x" * 9_000_000, capture_output=True).stdout
    check(b"HTTP/2 413" in out and b"too large" in out, out[:200])
    out = curl(h2, "-i", "-H", "content-type: application/grpc+json", "--data-binary", "x",
               f"{url}/t.T/Unary").decode()
    check("HTTP/2 415" in out, out)
    check(
        curl("--http1.1", "--data-binary", "x" * 100000, f"{url}/echo") == b"x" * 100000,
        "HTTP/1.1 with Expect")
    check(
        curl("--http2", f"{url}/headers").decode().startswith("GET /headers"), "an upgrade offer is ignored")


class Raw:
    """A few frames by hand: what well-behaved clients never send."""

    def __init__(self, port, window=65535):
        self.s = socket.create_connection(("127.0.0.1", port), timeout=patience(10))
        self.buf = b""
        self.s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" +
                       self.frame(4, 0, 0, struct.pack(">HI", 4, window)))

    @staticmethod
    def frame(kind, flags, stream, body=b""):
        return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body

    def send(self, *a):
        self.s.sendall(self.frame(*a))

    @staticmethod
    def field(k, v):
        return b"\0" + bytes([len(k)]) + k + bytes(
            [len(v)]) + v  # literal, not indexed, no Huffman; below 127 bytes

    def headers(self, stream, fields, flags=4):
        self.send(1, flags, stream, b"".join(self.field(k.encode(), v.encode()) for k, v in fields))

    def request(self, stream, path, flags=5, method="GET", more=()):
        self.headers(stream, [(":method", method), (":scheme", "http"), (":path", path),
                              (":authority", "a"), *more], flags)

    def grpc(self, stream, path, message, timeout=None, flags=4):
        self.request(stream, path, flags, "POST",
                     [("content-type", "application/grpc"),
                      ("te", "trailers")] + ([("grpc-timeout", timeout)] if timeout else []))
        self.send(0, 1, stream, b"\0" + struct.pack(">I", len(message)) + message)

    def read(self):
        while True:
            if len(self.buf) >= 9:
                n = int.from_bytes(self.buf[:3], "big")
                if len(self.buf) >= 9 + n:
                    f = (self.buf[3], self.buf[4], int.from_bytes(self.buf[5:9], "big") & 0x7FFFFFFF,
                         self.buf[9:9 + n])
                    self.buf = self.buf[9 + n:]
                    if f[0] == 4 and not f[1] & 1:
                        try:
                            self.send(4, 1, 0)
                        except OSError:
                            pass  # closed, but there may be more to read
                    return f
            try:
                b = self.s.recv(65536)
            except (OSError, socket.timeout):
                return None
            if not b:
                return None
            self.buf += b

    def until(self, done):
        frames = []
        while True:
            f = self.read()
            if f is None:
                return frames
            frames.append(f)
            if done(f):
                return frames

    def close(self):
        self.s.close()


def test_frames(s):
    # END_STREAM on HEADERS (no body), on an empty DATA frame, and a message cut over frames at odd places
    r = Raw(s.port)
    r.request(1, "/headers")
    f = r.until(lambda f: f[2] == 1 and f[1] & 1)
    check(any(x[0] == 0 and b"body=0" in x[3] for x in f), f)
    r.request(3, "/echo", 4, "POST")
    for part in (b"a", b"", b"bcd"):
        r.send(0, 0, 3, part)
    r.send(0, 1, 3)
    f = r.until(lambda f: f[2] == 3 and f[1] & 1)
    check(b"".join(x[3] for x in f if x[0] == 0 and x[2] == 3) == b"abcd", f)
    # trailers-only: one HEADERS frame with END_STREAM
    r.grpc(5, "/t.T/Fail", b"5 gone")
    f = [x for x in r.until(lambda f: f[2] == 5 and f[1] & 1) if x[2] == 5]
    check(len(f) == 1 and f[0][0] == 1 and f[0][1] & 1, f)
    # error while the body still arrives: full answer, then RST_STREAM(NO_ERROR)
    r.request(7, "/echo", 4, "POST", [("content-length", "99999999")])
    f = [x for x in r.until(lambda f: f[0] == 3) if x[2] == 7]
    check([x[0] for x in f] == [1, 0, 3] and f[-1][3] == b"\0\0\0\0", f)
    # client trailers end the request too
    r.request(9, "/echo", 4, "POST")
    r.send(0, 0, 9, b"t")
    r.headers(9, [("x-checksum", "1")], 5)
    f = r.until(lambda f: f[2] == 9 and f[1] & 1)
    check(b"".join(x[3] for x in f if x[0] == 0 and x[2] == 9) == b"t", f)
    r.send(6, 0, 0, b"pingpong")
    check(r.until(lambda f: f[0] == 6)[-1][3] == b"pingpong", "ping")
    r.close()
    # gRPC body frames with a wrong length
    r = Raw(s.grpc_port)
    r.request(1, "/t.T/Unary", 4, "POST", [("content-type", "application/grpc")])
    r.send(0, 1, 1, b"\0\0\0\0\x09abc")
    f = [x for x in r.until(lambda f: f[2] == 1 and f[1] & 1) if x[2] == 1]
    check(len(f) == 1 and b"grpc-status" not in f[0][3][:0], f)
    r.close()


def test_abuse(s):
    # rapid reset: the server ends the connection, not itself
    r = Raw(s.port)
    try:
        for i in range(3000):
            r.request(2 * i + 1, "/hang")
            r.send(3, 0, 2 * i + 1, b"\0\0\0\x08")
    except OSError:
        pass
    f = r.until(lambda f: f[0] == 7)
    check(f and f[-1][0] == 7, "GOAWAY after rapid reset", f[-1:] and f[-1][:3])
    r.close()
    # more streams than allowed: refused, the others live
    r = Raw(s.port)
    r.until(lambda f: f[0] == 4 and f[1] & 1)
    try:
        for i in range(300):
            r.request(2 * i + 1, "/hang")
    except OSError:
        pass  # closed meanwhile, after its GOAWAY
    f = r.until(lambda f: f[0] in (3, 7))
    check(f and f[-1][0] in (3, 7), "refused", f[-1:])
    r.close()
    for junk in (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
                 b"PRIX / HTTP/1.1\r\n\r\n"):
        k = socket.create_connection(("127.0.0.1", s.port), timeout=patience(10))
        k.sendall(junk)
        try:
            while k.recv(65536):
                pass
        except ConnectionResetError:
            pass
        k.close()
    check(Client(s.grpc_port).unary("/t.T/Unary")(b"ok", timeout=patience(5)) == b"ok", "alive")


def test_fuzz(s):
    """Valid sessions with random bytes flipped: the server answers or closes, and stays alive."""
    import random
    rng = random.Random(7)
    base = (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + Raw.frame(4, 0, 0) + Raw.frame(
        1, 4, 1, b"".join(
            Raw.field(k, v)
            for k, v in ((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/t.T/Unary"),
                         (b":authority", b"a"),
                         (b"content-type", b"application/grpc")))) + Raw.frame(0, 1, 1, b"\0\0\0\0\x03abc") +
            Raw.frame(8, 0, 0, b"\0\0\1\0") + Raw.frame(6, 0, 0, b"12345678"))
    for _ in range(600):
        b = bytearray(base)
        for _ in range(rng.randint(1, 6)):
            b[rng.randrange(24, len(b))] = rng.randrange(256)
        k = socket.create_connection(("127.0.0.1", s.port), timeout=patience(2))
        try:
            k.sendall(b)
            k.shutdown(socket.SHUT_WR)
            while k.recv(65536):
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass
        k.close()
    check(Client(s.grpc_port).unary("/t.T/Unary")(b"ok", timeout=patience(5)) == b"ok", "alive after fuzz")


def test_times():
    s = Server(idle=400000, header_us=200000, body_us=300000, slow=300000, mark=65536, drain=int(patience(10) * 1e6))
    r = Raw(s.port)
    f = r.until(lambda f: False)
    check(f and f[-1][0] == 7, "idle: GOAWAY and close", f)
    r = Raw(s.port)
    r.request(1, "/echo", 4, "POST")
    f = r.until(lambda f: f[0] == 3)
    check(any(x[0] == 1 for x in f) and f[-1][0] == 3, "body timeout: answer and RST", f)
    r = Raw(s.port)
    r.request(1, "/echo", 0)  # no END_HEADERS
    check(r.until(lambda f: False) is not None, "header timeout closes")
    r = Raw(
        s.port,
        window=1000)  # never opens its window: the stream is reset, on_close is called, a new stream works
    begin = time.time()
    r.request(1, "/flood?100000,20000,40000")
    f = r.until(lambda f: f[0] == 3)
    check(0.3 < time.time() - begin < patience(1.5), "by time, not by 16 marks", time.time() - begin)
    check(f and f[-1][0] == 3 and f[-1][2] == 1, "slow stream is reset", f[-1:])
    r.request(3, "/tick?1")
    check(any(x[0] == 0 and x[3] == b"ticked" for x in r.until(lambda f: f[2] == 3 and f[1] & 1)),
          "others go on")
    r.close()
    c = Client(s.grpc_port)
    wait(lambda: c.lost() == 1, "one lost")
    # drain: running calls finish, GOAWAY is seen, new ones are refused or go elsewhere
    it = c.stream("/t.T/Gen")(b"300 16 2000")
    next(it)
    done = {}
    t = threading.Thread(target=lambda: done.update(s.stop()))
    t.start()
    check(1 + sum(1 for _ in it) == 300, "a running stream outlives the drain")
    t.join(patience(20))
    check(done.get("live") == 0 and done.get("lost") == 1, done)


def test_stuck_peer():
    """A peer that stops reading its socket altogether: RST_STREAM cannot reach it, but on_close must come, by time
    or by size."""
    for slow, gap in ((300000, 30000), (30000000, 1000)):
        s = Server(slow=slow, mark=65536)
        k = socket.socket()
        k.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        k.connect(("127.0.0.1", s.port))
        r = Raw.__new__(Raw)
        r.s, r.buf = k, b""
        k.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" +
                  Raw.frame(4, 0, 0, struct.pack(">HI", 4, 0x7FFFFFFF)) + Raw.frame(8, 0, 0, b"\x7f\0\0\0"))
        r.request(1, f"/flood?100000,20000,{gap}")
        c = Client(s.grpc_port)
        wait(lambda: c.lost() == 1, "lost")
        k.close()
        end = s.stop()
        check(end["live"] == 0 and end["lost"] == 1 and end["max_unsent"] < 3 << 20, end)


def make_cert(d, name):
    subprocess.run([
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
        "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", f"{d}/key.new", "-out",
        f"{d}/cert.new"
    ], check=True, capture_output=True)
    os.replace(f"{d}/key.new", f"{d}/key.pem")
    os.replace(f"{d}/cert.new", f"{d}/cert.pem")


def test_tls():
    if not shutil.which("openssl") or not shutil.which("curl"):
        return
    with tempfile.TemporaryDirectory() as d:
        make_cert(d, "first")
        s = Server(cert=f"{d}/cert.pem", key=f"{d}/key.pem", idle=500000, header_us=300000)

        def curl(*args, data=None):
            return subprocess.run(["curl", "-s", "--max-time", "20", "--cacert", f"{d}/cert.pem", *args],
                                  input=data, capture_output=True).stdout
        url = f"https://localhost:{s.port}"
        check(curl("--http1.1", f"{url}/headers").startswith(b"GET /headers"), "TLS, HTTP/1.1")
        check(b"h2=1" in curl(f"{url}/headers"), "ALPN h2")
        for v in ("--http1.1", "--http2"):
            data = os.urandom(3_000_000)
            check(curl(v, "--data-binary", "@-", f"{url}/echo", data=data) == data, "echo over TLS", v)
            check(curl(v, f"{url}/stream?200,100,1000").count(b"data: ") == 201, "stream over TLS", v)
        cred = grpc.ssl_channel_credentials(open(f"{d}/cert.pem", "rb").read())
        ch = grpc.secure_channel(f"localhost:{s.grpc_port}", cred)
        gen = ch.unary_stream("/t.T/Gen", request_serializer=bytes, response_deserializer=bytes)
        check(len(list(gen(b"1000 1000 0", timeout=patience(10)))) == 1000, "gRPC over TLS")
        it = gen(b"100000 16 1000")
        next(it)
        it.cancel()
        lost = ch.unary_unary("/t.T/Lost", request_serializer=bytes, response_deserializer=bytes)
        wait(lambda: lost(b"", timeout=patience(5)) == b"1", "cancel over TLS")
        ch.close()
        k = socket.create_connection(("127.0.0.1", s.port), timeout=patience(10))
        k.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")  # plain bytes on a TLS port
        try:
            k.recv(1000)
        except OSError:
            pass
        k.close()
        k = socket.create_connection(("127.0.0.1", s.port), timeout=patience(10))  # no handshake at all
        begin = time.time()
        check(k.recv(1) == b"" and time.time() - begin < patience(5), "handshake timeout")
        make_cert(d, "second")  # renewal: picked up without a restart; curl trusts only the new one now
        wait(lambda: b"GET" in curl("--http1.1", f"{url}/headers"), "new certificate")
        check(s.stop()["live"] == 0, "end")
        s = Server(cert=f"{d}/cert.pem", key=f"{d}/key.pem", ca=f"{d}/cert.pem")
        url = f"https://localhost:{s.port}/headers"
        check(curl(url) == b"", "no client certificate")
        check(b"GET" in curl("--cert", f"{d}/cert.pem", "--key", f"{d}/key.pem", url), "with one")
        s.stop()


def main():
    if not os.path.exists(TOOL):
        print("SKIP:", TOOL, "is not built")
        sys.exit(77)
    s = Server()
    for test in (test_calls, test_status, test_deadline, test_deadline_slow_reader, test_cancel,
                 test_concurrent, test_slow_reader, test_curl, test_frames, test_abuse, test_fuzz):
        begin = time.time()
        test(s)
        if "-v" in sys.argv:
            print(test.__name__, round(time.time() - begin, 2), "s")
    end = s.stop()
    check(end["live"] == 0, end)
    test_times()
    test_stuck_peer()
    test_tls()
    print("failed" if failed else "passed", failed)
    sys.exit(1 if failed else 0)


main()
