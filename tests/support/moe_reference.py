"""The router of a mixture of experts in float64: how near each row of a golden checkpoint is to a tie. A forward pass of mixtral and
qwen3_moe in numpy, which also has to give the golden's logits.
SPDX-License-Identifier: Apache-2.0
"""
import glob
import json
import struct

import numpy as np


def weights(folder):
    """bf16 tensors, which safetensors' numpy side does not know."""
    out = {}
    for path in glob.glob(folder + "/model*.safetensors"):
        with open(path, "rb") as f:
            head = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
            data = f.read()
        for name, t in head.items():
            if name != "__metadata__":
                assert t["dtype"] == "BF16", name
                raw = np.frombuffer(data[slice(*t["data_offsets"])], dtype="<u2").astype(np.uint32) << 16
                out[name] = raw.view(np.float32).reshape(t["shape"]).astype(np.float64)
    return out


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Model:
    def __init__(self, folder):
        with open(folder + "/config.json") as f:
            self.c = json.load(f)
        self.w = weights(folder)

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c["rms_norm_eps"]) * self.w[name]

    def rope(self, x):
        n, _, D = x.shape
        angle = np.arange(n)[:, None] * self.c["rope_parameters"]["rope_theta"] ** (-np.arange(0, D, 2) / D)
        cos, sin, a, b = np.cos(angle)[:, None], np.sin(angle)[:, None], x[..., :D // 2], x[..., D // 2:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, x, p):
        n, H, G = len(x), self.c["num_attention_heads"], self.c["num_key_value_heads"]
        q, k, v = ((x @ self.w[f"{p}{s}_proj.weight"].T).reshape(n, h, -1) for s, h in (("q", H), ("k", G), ("v", G)))
        if p + "q_norm.weight" in self.w:
            q, k = self.norm(q, p + "q_norm.weight"), self.norm(k, p + "k_norm.weight")
        q, k = self.rope(q), np.repeat(self.rope(k), H // G, 1)
        s = np.einsum("thd,uhd->htu", q, k) / np.sqrt(q.shape[-1])
        out = np.einsum("htu,uhd->thd", softmax(np.where(np.tri(n, dtype=bool), s, -np.inf)), np.repeat(v, H // G, 1))
        return out.reshape(n, -1) @ self.w[p + "o_proj.weight"].T

    def mlp(self, x, gate, up, down):
        g = x @ self.w[gate].T
        return g / (1 + np.exp(-g)) * (x @ self.w[up].T) @ self.w[down].T

    def experts(self, x, p, names, router):
        k, y = self.c["num_experts_per_tok"], np.zeros_like(x)
        for t, row in enumerate(softmax(router)):
            top = np.argsort(-row, kind="stable")[:k]
            for e in top:
                y[t] += row[e] / row[top].sum() * self.mlp(x[t], *(f"{p}experts.{e}.{s}.weight" for s in names))
        return y

    def forward(self, ids):
        """(logits, [router logits of each layer that has experts])"""
        h, routers = self.w["model.embed_tokens.weight"][ids], []
        for i in range(self.c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            h = h + self.attention(self.norm(h, p + "input_layernorm.weight"), p + "self_attn.")
            x = self.norm(h, p + "post_attention_layernorm.weight")
            block, names = ("block_sparse_moe.", ("w1", "w3", "w2"))
            if p + "block_sparse_moe.gate.weight" not in self.w:
                block, names = ("mlp.", ("gate_proj", "up_proj", "down_proj"))
            if p + block + "gate.weight" in self.w:
                routers.append(x @ self.w[p + block + "gate.weight"].T)
                h = h + self.experts(x, p + block, names, routers[-1])
            else:
                h = h + self.mlp(x, *(f"{p}mlp.{s}.weight" for s in names))
        return self.norm(h, "model.norm.weight") @ self.w["lm_head.weight"].T, routers

    def margins(self, routers):
        """Of each row, the least distance between the last expert chosen and the first that is not, in parts of the largest
        router logit."""
        k, out = self.c["num_experts_per_tok"], []
        for r in routers:
            s = -np.sort(-r, -1)
            out.append((s[:, k - 1] - s[:, k]) / np.abs(r).max())
        return np.min(out, 0)
