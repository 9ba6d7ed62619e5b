# SPDX-License-Identifier: Apache-2.0
"""Chat templates out of model folders: where they are looked for, what is made of OpenAI messages, the demo
model's prompts by id."""
import glob
import json
import os
import sys
import tempfile

from jinja_support import Renderer, environment, expected
from text_support import DEMO, SHARED, Check

CALL = {"id": "call12345", "type": "function", "function": {"name": "f", "arguments": "{\"a\": [1, \"é\"]}"}}
TOOL = {
    "type": "function", "function": {
        "name": "f", "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "array"}}, "required": []}
    }
}


def tiny(folder, config=None, **files):
    vocab = {chr(i): i - 33 for i in range(33, 127)}
    json.dump(
        {
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
            "added_tokens": [{"id": 200, "content": "<s>", "special": True}]
        }, open(os.path.join(folder, "tokenizer.json"), "w"))
    json.dump({"bos_token": "<s>", **(config or {})}, open(os.path.join(folder, "tokenizer_config.json"),
                                                           "w"))
    for name, text in files.items():
        open(os.path.join(folder, name.replace("__", ".")), "w").write(text)


def render(ours, folder, messages, override=None, tools=None, extra=None, prompt=True):
    return ours.ask(model=folder, override=override, messages=messages, tools=tools, extra=extra,
                    prompt=prompt)


def sources(c, ours):
    user = [{"role": "user", "content": "hi"}]
    cases = [
        ({"chat_template": "A{{ bos_token }}{{ eos_token }}|"}, {}, None, "A<s>|"),
        ({"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use",
                                                                   "template": "T"}]}, {}, None, "D"),
        ({"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use",
                                                                   "template": "T"}]}, {}, [TOOL], "T"),
        ({"chat_template": [{"name": "rag", "template": "{% broken"}, {"name": "tool_use",
                                                                       "template": "T"}]}, {}, None, "T"),
        ({"chat_template": "A"}, {"chat_template__jinja": "F"}, None, "F"),
        ({}, {"chat_template__json": "{\"chat_template\": \"J\"}"}, None, "J"),
        ({"chat_template": "{{ tools is none }}{{ documents is none }}{{ tools | length if tools else 0 }}"},
         {}, [TOOL], "FalseTrue1"),
        ({
            "chat_template": "{{ tools is none }}{{ pad_token is defined }}{{ unk_token }}",
            "unk_token": {"content": "U"}
        }, {}, [], "TrueFalseU"),
    ]
    for config, files, tools, want in cases:
        with tempfile.TemporaryDirectory() as d:
            tiny(d, config, **files)
            got = render(ours, d, user, tools=tools)
            c.eq(got.get("text"), want, config, files, got)
            open(os.path.join(d, "o.jinja"), "w").write("O")
            c.eq(
                render(ours, d, user, override=os.path.join(d, "o.jinja"), tools=tools).get("text"), "O",
                "override")
            c.ok("error" in render(ours, d, user, override=os.path.join(d, "absent.jinja")),
                 "absent override")
    for config, part in [({"chat_template": "a\n{% if %}"}, "tokenizer_config.json: chat template line 2"),
                         ({"chat_template": 5}, "neither a string nor a list")]:
        with tempfile.TemporaryDirectory() as d:
            tiny(d, config)
            c.ok(part in render(ours, d, user).get("error", ""), config)
    with tempfile.TemporaryDirectory() as d:
        tiny(d, {"chat_template": "{{ messages | length }}{{ x }}{{ add_generation_prompt }}{{ bos_token }}"})
        c.eq(
            render(ours, d, user, extra={"x": 7, "messages": [], "bos_token": "no"}, prompt=False)["text"],
            "17False<s>", "extra variables")


def shapes(c, ours):
    """Templates of both kinds get the shape they take."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}]
    call = [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call12345", "content": "r"}, {"role": "assistant"}]
    as_text = "{% for m in messages %}[{{ m.content }}]{% for t in m.tool_calls %}" \
        "{{ t.function.arguments }}{% endfor %}{% endfor %}"
    as_json = "{% for m in messages %}{% if m.content is string %}[{{ m.content }}]{% else %}" \
        "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}" \
              "{% for t in m.tool_calls %}{{ t.function.arguments | tojson }}{% endfor %}{% endfor %}"
    for source, parts_text, call_text, flags in [
        (as_text, "[A\nB]", "[u][]{\"a\": [1, \"é\"]}[r][]", (False, False)),
        (as_json, "<A><B>", "[u][]{\"a\": [1, \"é\"]}[r][]", (True, True))
    ]:
        with tempfile.TemporaryDirectory() as d:
            tiny(d, {"chat_template": source})
            got = render(ours, d, parts)
            c.eq(got.get("text"), parts_text, source, got)
            c.eq((got.get("parts"), got.get("objects")), flags, source)
            c.eq(render(ours, d, call).get("text"), call_text, source)
            obj = json.loads(json.dumps(call))
            obj[1]["tool_calls"][0]["function"]["arguments"] = {"a": [1, "é"]}
            c.eq(render(ours, d, obj).get("text"), call_text, source)


def real_templates(c, ours):
    """No real template prints Python's idea of a call's arguments, or doubly quoted JSON, and every one that writes
    calls writes them."""
    wrote, found = 0, sorted(glob.glob(os.path.join(SHARED, "data", "chat_templates", "*.jinja")))
    if not found:
        print("SKIP of real templates: ../shared/data is not here")
        return
    for path in found:
        with tempfile.TemporaryDirectory() as d:
            tiny(d, {"chat_template": open(path, encoding="utf-8").read(), "eos_token": "</s>"})
            got = render(ours, d, [{"role": "user", "content": "u"}, {
                "role": "assistant", "content": None, "tool_calls": [CALL]
            }, {"role": "tool", "tool_call_id": "call12345", "name": "f", "content": "r"}], tools=[TOOL])
            text = got.get("text", "")
            c.ok("'a': [1" not in text, os.path.basename(path), "prints a Python dict:", text[-300:])
            wrote += "[1, \"é\"]" in text or "[1,\"é\"]" in text
    c.ok(wrote > 30, "templates that wrote the call:", wrote)


def demo(c, ours):
    model = os.path.join(DEMO, "target")
    for line in open(os.path.join(DEMO, "questions.jsonl"), encoding="utf-8"):
        q = json.loads(line)
        got = render(ours, model, q["messages"])
        c.eq(got.get("ids"), q["prompt_ids"], "demo prompt", got.get("text"))
    want, _ = expected(environment(),
                       open(os.path.join(model, "chat_template.jinja")).read(),
                       {"messages": q["messages"], "add_generation_prompt": True, "bos_token": "<|begin|>"})
    c.eq(got["text"], want, "demo text")


def main():
    c, ours = Check(), Renderer()
    sources(c, ours)
    shapes(c, ours)
    real_templates(c, ours)
    demo(c, ours)
    ours.close()
    return c.report()


if __name__ == "__main__":
    sys.exit(main())
