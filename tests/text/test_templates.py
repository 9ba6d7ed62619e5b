# SPDX-License-Identifier: Apache-2.0
"""The chat templates of 55 real models on 16 conversations: our bytes are Jinja2's, or both refuse."""
import glob
import json
import os
import sys

from jinja_support import Renderer, compare, environment
from text_support import SHARED, Check, need

TOOLS = [{
    "type": "function", "function": {
        "name": "get_weather", "description": "Weather \"now\" in a city, <b>.", "parameters": {
            "type": "object", "properties": {
                "city": {"type": "string", "description": "The city's name"},
                "days": {"type": "integer", "default": 3,
                         "minimum": 1}, "units": {"type": "string", "enum": ["metric", "imperial"]},
                "tags": {"type": "array", "items": {"type": "string"}}, "where": {
                    "type": "object",
                    "properties": {"lat": {"type": "number"}, "lon": {"type": ["number", "null"]}}
                }
            }, "required": ["city"], "additionalProperties": False
        }
    }
}, {
    "type": "function", "function": {
        "name": "add", "description": "Adds.", "parameters": {
            "type": "object", "properties": {
                "a": {"type": "number", "description": "first"},
                "b": {"anyOf": [{"type": "number"}, {"type": "string"}]}
            }, "required": ["a", "b"]
        }, "return": {"type": "number"}
    }
}, {
    "type": "function", "function": {
        "name": "noop", "description": "Nothing", "parameters": {"type": "object", "properties": {}}
    }
}]
BASE = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}


def call(name, arguments, id="call12345", text=False):
    return {
        "id": id, "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments) if text else arguments}
    }


def conversations():
    user = {"role": "user", "content": "What is the weather in Zürich? 天气 🌦\n\nThanks "}
    weather = call(
        "get_weather",
        {"city": "Zürich", "days": 2, "where": {"lat": 47.4, "lon": None}, "ok": True, "tags": ["a", "b"]})
    yield "tool call and result", {
        "messages": [{"role": "system", "content": "Be brief."}, user, {
            "role": "assistant", "content": "", "tool_calls": [weather]
        }, {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": "{\"t\": 21.5}"}],
        "tools": TOOLS
    }
    yield "tool call as text", {
        "messages": [
            user, {
                "role": "assistant", "content": None,
                "tool_calls": [call("add", {"a": 1, "b": "2"}, text=True)]
            }, {"role": "tool", "tool_call_id": "call12345", "name": "add", "content": "3"}
        ], "tools": TOOLS
    }
    yield "parallel tools", {
        "messages": [
            user, {
                "role": "assistant", "content": "Two at once.",
                "tool_calls": [weather, call("add", {"a": 1.5, "b": -2}, "call67890")]
            }, {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": "rain"},
            {"role": "tool", "tool_call_id": "call67890", "name": "add", "content": "-0.5"},
            {"role": "assistant", "content": "It rains."}, {"role": "user", "content": "And?"}
        ], "tools": TOOLS
    }
    yield "reasoning", {
        "messages": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}, {
            "role": "assistant", "content": "2", "reasoning_content": "One and one.\nTwo.",
            "thinking": "One and one."
        }, {"role": "user",
            "content": "2+2?"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"},
                     {"role": "user", "content": "sure?"}], "enable_thinking": True
    }
    yield "thinking off", {
        "messages": [{"role": "user", "content": "hi"}], "enable_thinking": False, "thinking": False,
        "reasoning_effort": "high"
    }
    yield "reasoning and tools", {
        "messages": [{"role": "user", "content": "go"}, {
            "role": "assistant", "content": "", "reasoning_content": "call it", "tool_calls": [weather]
        }, {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": "dry"}, {
            "role": "assistant", "content": "", "reasoning_content": "again",
            "tool_calls": [call("noop", {})]
        }], "tools": TOOLS, "add_generation_prompt": False
    }
    yield "unicode", {
        "messages": [{
            "role": "user", "content": "ß İ 👩‍👧 \u2028 \u00a0 é \x7f \t tab \"q\" 'a' \\ <|im_end|>"
        }, {"role": "assistant", "content": "  ok\u3000 "}, {"role": "user", "content": "\n"}]
    }
    yield "empty system", {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": ""}]}
    yield "only assistant", {
        "messages": [{"role": "assistant", "content": "x"}], "add_generation_prompt": False
    }
    yield "parts", {
        "messages": [{"role": "system", "content": [{"type": "text", "text": "S"}]}, {
            "role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
        }]
    }
    yield "image", {
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    }
    yield "developer", {
        "messages": [{"role": "developer", "content": "dev"}, {"role": "user", "content": "u"}],
        "tools": None, "documents": None
    }
    yield "documents", {
        "messages": [{"role": "user", "content": "u"}],
        "documents": [{"title": "T", "text": "body"}, {"title": "U", "text": "more"}], "tools": None
    }
    yield "long", {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": "turn %d" % i} for i in range(41)]
    }
    yield "no messages", {"messages": []}
    yield "no bos", {"messages": [{"role": "user", "content": "u"}], "bos_token": None, "eos_token": None}


def main():
    c, ours, rendered = Check(), Renderer(), 0
    folder = need(os.path.join(SHARED, "data", "chat_templates"))
    templates = sorted(glob.glob(os.path.join(folder, "*.jinja")))
    c.ok(len(templates) >= 50, "only", len(templates), "templates")
    contexts = [(os.path.basename(p), json.load(open(p)))
                for p in sorted(glob.glob(os.path.join(folder, "contexts", "*.json")))]
    contexts += [(name, {**BASE, **context}) for name, context in conversations()]
    for immutable in (True, False):
        env = environment(immutable)
        for path in templates:
            source = open(path, encoding="utf-8").read()
            for name, context in contexts:
                label = "%s on %s%s" % (os.path.basename(path), name, "" if immutable else " (mutable)")
                rendered += compare(c, env, ours, source, context, label, immutable)
    c.ok(rendered > len(templates) * len(contexts), "too few rendered:", rendered)
    ours.close()
    return c.report()


if __name__ == "__main__":
    sys.exit(main())
