"""Small decoders over small trees for decoder_forward, NaN wherever it must not read, and the same by single ops."""

import dataclasses
import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from support.forests import as_tables, tree_rows
from torch import nn

from treedecode import ops, reference
from treedecode.ops.decoder_forward import LAYER_TENSORS

PLAIN = {
    "dtype": torch.float32, "sizes": (24, 4, 2, 8, 40, 37), "num_layers": 2, "page_size": 4, "head_norms": False,
    "biases": False, "sinks": False, "soft_caps": 0.0, "windows": -1, "gate": "silu", "unit_offset": False, "idle": 0,
    "logit_rows": None, "q_lens": None, "layout": "HND",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """One call of `ops.decoder_forward`; `plain` has the weights before packing, `options` what PLAIN lists."""

    args: tuple
    weights: ops.DecoderWeights
    plain: list
    head: dict
    options: dict

    @property
    def kv(self):
        return self.args[3]

    def replace(self, **changes):
        """Returns the case with other arguments, by name."""
        names = ("x", "cos", "sin", "kv", "slots", "page_table", "seq_lens", "plan", "logit_rows")
        args = tuple(changes.pop(name, value) for name, value in zip(names, self.args, strict=True))
        return dataclasses.replace(self, args=args, weights=dataclasses.replace(self.weights, **changes))

    def run(self, module=ops):
        """Returns (logits, hidden, kv), with a copy of kv; other arguments are not copied."""
        case = self.replace(kv=self.kv.clone(memory_format=torch.preserve_format))
        return *module.decoder_forward(*case.args, case.weights), case.kv


def draw(dtype, *shape, scale=1.0):
    """Draws normal numbers, rounded to `dtype`."""
    return (torch.randn(shape) * scale).to(dtype)


@functools.cache  # tests of each instruction set use the same cases
def make_case(**options):
    """Makes a case of four branches of a tree that forks twice, a single prompt, and a branch without queries."""
    o = PLAIN | options
    torch.manual_seed(0)
    dtype, page_size = o["dtype"], o["page_size"]
    hidden, num_qo_heads, num_kv_heads, head_dim, _, vocab = o["sizes"]
    unit = max(1, 8 // page_size)
    rows = [*tree_rows([2, 2], [2 * unit, unit, 2]), [90 + i for i in range(unit + 1)], [200]]
    q_lens = o["q_lens"] or [1, 2, 1, 1, page_size + 1, 0]
    table, lens = as_tables(rows, page_size, [1, page_size, page_size // 2 + 1, 1, page_size, 1])
    used = torch.arange(table.shape[1]) * page_size < lens[:, None]
    ids, dense = table[used].unique(return_inverse=True)
    num_pages = len(ids) + 2
    table[used] = torch.randperm(num_pages)[dense].int()
    plan = ops.plan_tree(
        table, lens, torch.tensor(q_lens, dtype=torch.int32), page_size=page_size, num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim,
    )  # fmt: skip
    positions = [(row, p) for row, n in enumerate(lens.tolist()) for p in range(n)]
    asked = [(row, p) for row, p in positions if p >= lens[row] - q_lens[row]]
    slot_of = {(row, p): int(table[row, p // page_size]) * page_size + p % page_size for row, p in positions}
    slots = torch.tensor([slot_of[key] for key in asked] + [-1] * o["idle"], dtype=torch.int64)
    assert len(slots.unique()) >= len(asked)  # no two tokens share a slot
    shape = (o["num_layers"], 2, num_pages, num_kv_heads, page_size, head_dim)
    kv = torch.full(shape, torch.nan, dtype=dtype)
    if o["layout"] == "NHD":
        kv = kv.transpose(3, 4).contiguous().transpose(3, 4)
    held = torch.tensor(sorted(set(slot_of.values()) - set(slots.tolist())), dtype=torch.int64)
    kv[:, :, held // page_size, :, held % page_size] = draw(dtype, len(held), *shape[:2], num_kv_heads, head_dim)
    num_tokens = len(slots)
    angles = torch.rand(2, num_tokens, head_dim) * 6.3
    cos, sin = angles[0].cos().to(dtype), angles[1].sin().to(dtype)
    plain = [draw_layer(o) for _ in range(o["num_layers"])]
    head = {"final_norm": 1 + draw(dtype, hidden, scale=0.2), "lm_head": draw(dtype, vocab, hidden, scale=hidden**-0.5)}
    head["bias"] = draw(dtype, vocab) if o["biases"] else None
    logit_rows = torch.arange(num_tokens) if o["logit_rows"] is None else torch.tensor(o["logit_rows"]).long()
    args = (draw(dtype, num_tokens, hidden), cos, sin, kv, slots, table, lens, plan, logit_rows)
    return Case(args, packed(plain, head, o), plain, head, o)


def draw_layer(o):
    dtype = o["dtype"]
    hidden, num_qo_heads, num_kv_heads, head_dim, intermediate, _ = o["sizes"]
    layer = {"input_norm": 1 + draw(dtype, hidden, scale=0.2), "output_norm": 1 + draw(dtype, hidden, scale=0.2)}
    heads = num_qo_heads + 2 * num_kv_heads
    shapes = {
        "qkv": (heads * head_dim, hidden), "o_proj": (hidden, num_qo_heads * head_dim), "gate": (intermediate, hidden),
        "up": (intermediate, hidden), "down": (hidden, intermediate),
    }  # fmt: skip
    for name, shape in shapes.items():
        layer[name] = draw(dtype, *shape, scale=shape[1] ** -0.5)
        layer[f"{name}_bias"] = draw(dtype, shape[0], scale=0.5) if o["biases"] else None
    for name in ("q_norm", "k_norm"):
        layer[name] = 1 + draw(dtype, head_dim, scale=0.2) if o["head_norms"] else None
    layer["sinks"] = torch.randn(num_qo_heads) if o["sinks"] else None
    return layer


def packed(plain, head, o):
    """Packs the weights of `make_case` as DecoderWeights; windows, soft caps and scales alternate between layers."""
    _, num_qo_heads, _, head_dim, intermediate, vocab = o["sizes"]
    none = head["lm_head"].new_empty(0)

    def bias(*biases):
        return none if biases[0] is None else ops.pack_bias(*biases)

    tensors = []
    for layer in plain:
        optional = {name: none if layer[name] is None else layer[name] for name in ("q_norm", "k_norm", "sinks")}
        tensors += [
            layer["input_norm"], ops.pack_weight(layer["qkv"]), bias(layer["qkv_bias"]),
            optional["q_norm"], optional["k_norm"], ops.pack_weight(layer["o_proj"]), bias(layer["o_proj_bias"]),
            layer["output_norm"], ops.pack_weight(layer["gate"], layer["up"]),
            bias(layer["gate_bias"], layer["up_bias"]), ops.pack_weight(layer["down"]), bias(layer["down_bias"]),
            optional["sinks"],
        ]  # fmt: skip
    return ops.DecoderWeights(
        tensors=[*tensors, head["final_norm"], ops.pack_weight(head["lm_head"]), bias(head["bias"])],
        sm_scales=[head_dim**-0.5 * (1 + 0.3 * i) for i in range(len(plain))],
        soft_caps=[o["soft_caps"] if i % 2 == 0 else 0.0 for i in range(len(plain))],
        windows=[o["windows"] if i % 2 == 0 else -1 for i in range(len(plain))],
        eps=1e-5, unit_offset=o["unit_offset"], gate=o["gate"], num_qo_heads=num_qo_heads,
        intermediate_size=intermediate, vocab_size=vocab,
    )  # fmt: skip


def one_after_another(case):
    """Computes (logits, hidden, kv) by the single ops."""
    x, cos, sin, kv, slots, table, lens, plan, logit_rows = case.replace(
        kv=case.kv.clone(memory_format=torch.preserve_format)
    ).args
    w = case.weights
    num_tokens, (hidden, _, num_kv_heads, head_dim, _, _) = x.shape[0], case.options["sizes"]
    heads = [w.num_qo_heads, num_kv_heads, num_kv_heads]

    def norm(x, weight):
        return ops.rms_norm(x, weight, w.eps, unit_offset=w.unit_offset)

    def linear(x, weight, bias, out_features, **rest):
        return ops.packed_linear(x, weight, out_features, bias=bias if bias.numel() else None, **rest)

    step = len(LAYER_TENSORS)
    for i in range(len(kv)):
        t = dict(zip(LAYER_TENSORS, w.tensors[i * step : (i + 1) * step], strict=True))
        fused = linear(norm(x, t["input_norm"]), t["qkv"], t["qkv_bias"], sum(heads) * head_dim)
        q, k, v = fused.view(num_tokens, -1, head_dim).split(heads, dim=1)
        if t["q_norm"].numel():
            q, k = norm(q, t["q_norm"]), norm(k, t["k_norm"])
        ops.rotary_embed(q, k, cos, sin)
        k_pages, v_pages = kv[i, 0].transpose(1, 2), kv[i, 1].transpose(1, 2)
        ops.append_kv(k, v, k_pages, v_pages, slots)
        out, _ = ops.tree_attention(
            q, k_pages, v_pages, table, lens, plan, sm_scale=w.sm_scales[i], window_left=w.windows[i],
            logits_soft_cap=w.soft_caps[i], sinks=t["sinks"] if t["sinks"].numel() else None,
        )  # fmt: skip
        x = linear(out.view(num_tokens, -1), t["o_proj"], t["o_proj_bias"], hidden, residual=x)
        act = linear(norm(x, t["output_norm"]), t["gate_up"], t["gate_up_bias"], w.intermediate_size, gate=w.gate)
        x = linear(act, t["down"], t["down_bias"], hidden, residual=x)
    states = norm(x[logit_rows], w.tensors[-3])
    return linear(states, w.tensors[-2], w.tensors[-1], w.vocab_size), states, kv


def in_torch(case, dtype):
    """Computes (logits, hidden) by torch operators in `dtype`, branch by branch and with dense masks."""
    x, cos, sin, kv, slots, table, lens, plan, logit_rows = case.args
    w, kv = case.weights, case.kv.to(dtype, copy=True)
    x, cos, sin = x.to(dtype), cos.to(dtype), sin.to(dtype)
    _, num_qo_heads, num_kv_heads, head_dim, _, _ = case.options["sizes"]
    page_size, group = case.options["page_size"], num_qo_heads // num_kv_heads
    act = F.silu if w.gate == "silu" else nn.GELU(approximate="tanh")
    written = slots >= 0

    def norm(x, weight):
        normed = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + w.eps).rsqrt()
        return normed.to(dtype) * weight.to(dtype) if not w.unit_offset else (normed * (1 + weight.double())).to(dtype)

    def linear(x, layer, name):
        bias = layer[name + "_bias" if name != "lm_head" else "bias"]
        return F.linear(x, layer[name].to(dtype), None if bias is None else bias.to(dtype))

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]

    for i, layer in enumerate(case.plain):
        q, k, v = (
            linear(norm(x, layer["input_norm"]), layer, "qkv")
            .unflatten(1, (-1, head_dim))
            .split([num_qo_heads, num_kv_heads, num_kv_heads], dim=1)
        )
        if layer["q_norm"] is not None:
            q, k = norm(q, layer["q_norm"]), norm(k, layer["k_norm"])
        q, k = rotate(q), rotate(k)
        positions = slots[written]
        kv[i, 0, positions // page_size, :, positions % page_size] = k[written]
        kv[i, 1, positions // page_size, :, positions % page_size] = v[written]
        mixed = torch.zeros_like(q)
        for row, (begin, end) in enumerate(pairwise(plan.q_indptr.tolist())):
            n = int(lens[row])
            if begin == end:
                continue
            pages = table[row, : -(-n // page_size)].long()
            keys, values = (
                kv[i, j, pages].transpose(0, 1).flatten(1, 2)[:, :n].repeat_interleave(group, 0) for j in (0, 1)
            )
            score = q[begin:end].transpose(0, 1) @ keys.mT * w.sm_scales[i]
            if w.soft_caps[i]:
                score = w.soft_caps[i] * torch.tanh(score / w.soft_caps[i])
            key, position = torch.arange(n), torch.arange(n - (end - begin), n)[:, None]
            unseen = key > position
            if w.windows[i] >= 0:
                unseen |= key < position - w.windows[i]
            score = score.masked_fill(unseen, -torch.inf)
            if layer["sinks"] is not None:
                score = torch.cat([score, layer["sinks"].to(dtype)[:, None, None].expand(-1, end - begin, 1)], dim=-1)
            mixed[begin:end] = (score.softmax(-1)[..., :n] @ values).transpose(0, 1)
        x = x + linear(mixed.flatten(1), layer, "o_proj")
        normed = norm(x, layer["output_norm"])
        x = x + linear(act(linear(normed, layer, "gate")) * linear(normed, layer, "up"), layer, "down")
    states = norm(x[logit_rows], case.head["final_norm"])
    return linear(states, case.head, "lm_head"), states, kv


def in_float64(case):
    """Returns the case with all tensors in float64, for the reference; packed again, since bf16 has another layout."""
    args = tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in case.args)
    plain = [{name: None if t is None else t.double() for name, t in layer.items()} for layer in case.plain]
    head = {name: None if t is None else t.double() for name, t in case.head.items()}
    return dataclasses.replace(case, args=args, weights=packed(plain, head, case.options))


@functools.lru_cache(maxsize=256)
def truth(case):
    """Returns (exact results of the reference, the same by torch in the case's dtype)."""
    return in_float64(case).run(reference), in_torch(case, case.args[0].dtype)


def branch_alone(case, row):
    """Returns the case of one branch's query tokens alone, and the indices of these tokens."""
    x, cos, sin, _, slots, table, lens, plan, _ = case.args
    begin, end = plan.q_indptr[row : row + 2].tolist()
    tokens = slice(begin, end)
    _, num_qo_heads, num_kv_heads, head_dim, _, _ = case.options["sizes"]
    own = table[row : row + 1], lens[row : row + 1]
    alone = ops.plan_tree(
        *own, torch.tensor([end - begin], dtype=torch.int32), page_size=case.options["page_size"],
        num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
    )  # fmt: skip
    changes = {"x": x[tokens], "cos": cos[tokens], "sin": sin[tokens], "slots": slots[tokens], "page_table": own[0]}
    return case.replace(**changes, seq_lens=own[1], plan=alone, logit_rows=torch.arange(end - begin)), tokens


def bits(x):
    """Returns the bits, which compare equal for NaN too."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_same(got, want):
    """Asserts that (logits, hidden, kv) are equal to the last bit."""
    for name, a, b in zip(("logits", "hidden", "kv"), got, want, strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(bits(a), bits(b)), name
