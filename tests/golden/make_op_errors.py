# SPDX-License-Identifier: Apache-2.0
"""Writes tests/kernels/torch_errors.h: the error of PyTorch's own operations against float64, on the inputs of
tests/kernels/case_error.h, which are made here a second time by the same generator.

    python make_op_errors.py OUT        needs: torch numpy

One line per operation and type: inputs are rounded to the type, PyTorch (on a CPU) computes in it, float64 computes from the
same rounded inputs; the largest and the root mean square difference are written, and a hash of the inputs before rounding.
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F

TYPES = {"TD_F32": torch.float32, "TD_BF16": torch.bfloat16, "TD_F16": torch.float16}
T, E, FF, N, K = 24, 2048, 1200, 96, 1024
H, G, D, L = 8, 2, 64, 300
X, TOP, V, PARTS = 128, 8, 8501, 8
M64 = (1 << 64) - 1


def fp8(w, s):
    """W of E4M3 codes with a scale a row, in f32: what every product of codes is of."""
    return w.to(torch.float8_e4m3fn).float() * (s.abs() * 0.0078125 + 0.0078125)[:, None]


class Inputs:
    """rnd_fill of tests/kernels/support.h; the hash runs over everything that was made."""

    def __init__(self):
        self.hash = 2166136261

    def __call__(self, seed, scale, *shape):
        n, s, f = int(np.prod(shape)), seed, np.float32
        u = np.empty(4 * n, np.uint32)
        for i in range(4 * n):
            s = (s * 6364136223846793005 + 1442695040888963407) & M64
            u[i] = ((s ^ (s >> 29)) >> 31) & 0xffffffff
        v = ((u >> 8).astype(f) * f(2.0 ** -24) - f(0.5)).reshape(n, 4)
        x = (((v[:, 0] + v[:, 1]) + v[:, 2]) + v[:, 3]) * f(1.7320508) * f(scale)
        for w in x.view(np.uint32).tolist():
            self.hash = ((self.hash ^ w) * 16777619) & 0xffffffff
        return torch.from_numpy(x.reshape(shape))


def rms_norm(x, w, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w


def rope(x, c, s):
    a, b = x.chunk(2, -1)
    return torch.cat((a * c - b * s, a * s + b * c), -1)


def attention(q, k, v):
    s = q @ k.repeat_interleave(H // G, 0).transpose(1, 2) / D ** 0.5
    s = s.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
    return torch.softmax(s, -1) @ v.repeat_interleave(H // G, 0)


def route(logits):
    p, _ = torch.topk(torch.softmax(logits, -1), TOP)
    return p / p.sum(-1, keepdim=True)


def cases():
    """name, types, inputs, in float64, as PyTorch has it"""
    eps, r = np.float32(1e-5).item(), Inputs
    gelu = lambda g: 0.5 * g * (1 + torch.erf(g / 2 ** 0.5))
    tanh = lambda g: 0.5 * g * (1 + torch.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g ** 3)))
    gated = lambda a: lambda x: a(x[:, :FF]) * x[:, FF:]
    rows = lambda x: x.view(T, -1, D)
    yield ("rmsnorm", TYPES, lambda r: (r(21, 3, T, E), r(22, 1, E)), lambda x, w: rms_norm(x, w, eps),
           lambda x, w: F.rms_norm(x, (E,), w, eps))
    yield ("add_rmsnorm", TYPES, lambda r: (r(21, 3, T, E), r(23, 1, T, E), r(22, 1, E)),
           lambda x, d, w: rms_norm(x + d, w, eps), lambda x, d, w: F.rms_norm(x + d, (E,), w, eps))
    for name, exact, own in (("silu_mul", lambda g: g * torch.sigmoid(g), F.silu), ("gelu_mul", gelu, F.gelu),
                             ("gelu_tanh_mul", tanh, lambda g: F.gelu(g, approximate="tanh"))):
        yield name, TYPES, lambda r: (r(31, 3, T, 2 * FF),), gated(exact), gated(own)
    heads = (H + 2 * G) * D
    cs = lambda r: (r(41, 1, T, heads), r(42, 1, T, D // 2, 2))
    turn = lambda x, c: rope(rows(x)[:, :H + G], c[:, None, :, 0], c[:, None, :, 1])
    yield "rope", ["TD_F32"], cs, turn, turn
    normed = lambda norm: lambda x, c, q, k: rope(
        torch.cat((norm(rows(x)[:, :H], q), norm(rows(x)[:, H:H + G], k)), 1), c[:, None, :, 0], c[:, None, :, 1])
    yield ("norm_rope", ["TD_F32"], lambda r: cs(r) + (r(43, 1, D), r(44, 1, D)),
           normed(lambda x, w: rms_norm(x, w, eps)), normed(lambda x, w: F.rms_norm(x, (D,), w, eps)))
    linear = lambda x, w, b: x @ w.T + b
    operands = lambda r: (r(51, 1, T, K), r(52, 0.5, N, K), r(53, 1, N))
    yield "linear", TYPES, operands, linear, F.linear
    # Products of 16-bit values added up in f32 and left there: what a kernel's sums are off by, and no rounding of results.
    yield "linear_sums", ["TD_BF16", "TD_F16"], operands, linear, lambda *v: F.linear(*(x.float() for x in v))
    codes = lambda r: (r(51, 1, T, K), r(54, 100, N, K), r(55, 1, N), r(53, 1, N))
    yield ("linear", ["TD_E4M3"], codes, lambda x, w, s, b: linear(x.bfloat16().double(), fp8(w, s).double(), b.bfloat16().double()),
           lambda x, w, s, b: F.linear(x.bfloat16(), fp8(w, s).bfloat16(), b.bfloat16()))
    yield ("sum_tree", ["TD_F32"], lambda r: (r(61, 1, PARTS, T, N), r(53, 1, N)), lambda p, b: p.sum(0) + b,
           lambda p, b: p.sum(0) + b)
    yield ("attention", TYPES, lambda r: (r(71, 2, L, H, D), r(72, 1, L, G, D), r(73, 1, L, G, D)),
           lambda q, k, v: attention(*(t.transpose(0, 1) for t in (q, k, v))),
           lambda q, k, v: F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True,
                                                          enable_gqa=True)[0])
    yield "moe_logits", ["TD_F32"], lambda r: (r(81, 1, T, E), r(82, 1, X, E)), lambda x, w: x @ w.T, F.linear
    yield "moe_route", ["TD_F32"], lambda r: (r(83, 2, T, X),), route, route
    mix = lambda y, w, o: o + (y * w[:, :, None]).sum(1)
    yield "moe_combine", ["TD_F32"], lambda r: (r(84, 1, T, TOP, E), r(85, 1, T, TOP), r(86, 1, T, E)), mix, mix
    yield ("score", ["TD_F32"], lambda r: (r(91, 3, T, V),), lambda x: torch.log_softmax(x, -1),
           lambda x: torch.log_softmax(x, -1))


def main():
    torch.set_num_threads(1)
    lines = []
    for name, types, make, exact, own in cases():
        r = Inputs()
        x = make(r)
        for t in types:
            rounded = [v.to(TYPES.get(t, torch.float32)) for v in x]
            e = (own(*rounded).double() - exact(*(v if t == "TD_E4M3" else v.double() for v in rounded))).abs()
            lines.append(f'    {{"{name}", {t}, {e.max().item():.6e}, {e.square().mean().sqrt().item():.6e}, 0x{r.hash:08x}}},\n')
            print(lines[-1], end="")
    with open(sys.argv[1], "w") as f:
        f.write("/* tests/kernels/torch_errors.h - what PyTorch's operations are off by: written by tests/golden/make_op_errors.py,\n"
                f" * torch {torch.__version__.split('+')[0]} on a CPU. Differences to float64 on the inputs of case_error.h. */\n"
                "// SPDX-License-Identifier: Apache-2.0\n#ifndef TD_TESTS_KERNELS_TORCH_ERRORS_H\n#define TD_TESTS_KERNELS_TORCH_ERRORS_H\n\n"
                '#include "kernels/tensor.h"\n\ntypedef struct torch_error {\n    const char *op;\n    td_dtype dtype;\n'
                "    double most, square; /* the largest, the root of the mean square */\n    uint32_t inputs;     /* hash */\n} torch_error;\n"
                "static const torch_error torch_errors[] = {\n" + "".join(lines) + "};\n\n#endif\n")


main()
