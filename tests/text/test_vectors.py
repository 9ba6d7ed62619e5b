# SPDX-License-Identifier: Apache-2.0
"""Published token ids: 47 strings for each of four vocabularies, and the demo model's prompts and answers."""
import json
import os
import sys

from text_support import DEMO, TOKENIZERS, Check, Tokenizer, need

PAIRS = [("gpt-2", "gpt2"), ("llama-spm", "phi-3-mini"), ("phi-3", "phi-3-mini"),
         ("roberta-bpe", "roberta-base")]


def vectors(c):
    for name, folder in PAIRS:
        base = os.path.join(TOKENIZERS, "vectors", name)
        texts = open(need(base + ".inp"), encoding="utf-8",
                     newline="").read().split("\n__ggml_vocab_test__\n")
        lines = open(base + ".out").read().split("\n")
        c.ok(len(texts) >= 46, name, "has", len(texts), "strings")
        t = Tokenizer(os.path.join(TOKENIZERS, folder))
        for text, line in zip(texts, lines):
            ids = [int(x) for x in line.split()]
            c.eq(t.encode(text), ids, name, repr(text))
            c.eq(t.decode(ids), text, name, "decode", repr(text))
        t.close()


def demo(c):
    t = Tokenizer(os.path.join(DEMO, "target"))
    for line in open(os.path.join(DEMO, "questions.jsonl"), encoding="utf-8"):
        q = json.loads(line)
        prompt = "<|begin|>" + "".join("<|%s|>%s<|end|>" % (m["role"], m["content"].strip())
                                       for m in q["messages"]) + "<|assistant|>"
        c.eq(t.encode(prompt), q["prompt_ids"], "demo prompt")
        c.eq(t.decode(q["answer_ids"], skip=True), q["answer"], "demo answer")
        literal = t.encode(q["messages"][0]["content"] + "<|end|>", parse=False)
        c.ok(1 not in literal, "special text in user text must stay text")
    t.close()


def main():
    c = Check()
    demo(c)
    if c.failed:
        return c.report()
    need(TOKENIZERS)
    vectors(c)
    return c.report()


if __name__ == "__main__":
    sys.exit(main())
