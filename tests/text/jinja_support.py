# SPDX-License-Identifier: Apache-2.0
"""Jinja2 set up as transformers does, and our interpreter behind a pipe."""
import datetime
import functools
import json
import subprocess
import warnings

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

from text_support import tool

warnings.filterwarnings("ignore", category=SyntaxWarning)
NOW = 1753700000  # 2025-07-28


def environment(immutable=True):
    cls = ImmutableSandboxedEnvironment if immutable else SandboxedEnvironment
    env = cls(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda f: datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc
                                                                            ).strftime(f)
    return env


@functools.lru_cache(maxsize=64)
def compiled(env, source):
    return env.from_string(source)


def expected(env, source, context):
    """(text, None) or (None, the error)."""
    try:
        return compiled(env, source).render(**json.loads(json.dumps(context))), None
    except Exception as e:
        return None, "%s: %s" % (type(e).__name__, e)


class Renderer:
    def __init__(self):
        self.p = subprocess.Popen([tool("tool_render")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE)

    def ask(self, **q):
        self.p.stdin.write(json.dumps(q).encode() + b"\n")
        self.p.stdin.flush()
        line = self.p.stdout.readline()
        if not line:
            raise RuntimeError("renderer ended: " + self.p.stderr.read().decode(errors="replace")[-3000:])
        return json.loads(line)

    def render(self, source, context, immutable=True, **more):
        return self.ask(template=source, context=context, immutable=immutable, now=NOW, **more)

    def close(self):
        self.p.stdin.close()
        self.p.wait()


def compare(c, env, ours, source, context, label, immutable=True):
    want, why = expected(env, source, context)
    got = ours.render(source, context, immutable)
    if want is None:
        c.ok("error" in got, label, "Jinja2 failed:", why, "\n   we gave", repr(got)[:300])
    elif "error" in got:
        c.ok(False, label, "we failed:", got["error"], got["status"], "\n   Jinja2 gave", repr(want)[:300])
    else:
        k = next((i for i, (x, y) in enumerate(zip(got["text"], want)) if x != y),
                 min(len(got["text"]), len(want)))
        c.ok(got["text"] == want, label, "differs at", k, "\n   got ",
             repr(got["text"][max(0, k - 60):k + 100]), "\n   want", repr(want[max(0, k - 60):k + 100]))
    return want is not None
