"""Dense attention of long prefills against the reference, and decoding after it."""

import pytest
import torch
from support.transformers_models import make_model

import treedecode as td
from treedecode import ops, reference
from treedecode.models import TransformersModel, prefill

PROMPTS = [list(range(5, 75)), [*range(5, 40), 9, 8, 7, 6], [7, 8, 9]]
GREEDY = td.Sampling(temperature=0, ignore_eos=True)


@pytest.mark.parametrize("window", [None, 3, 9, 100])
@pytest.mark.parametrize(("q_len", "seq_len"), [(7, 7), (5, 12), (1, 9)])
def test_attend_matches_the_reference(q_len, seq_len, window):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(q_len, 6, 16, generator=generator)
    k, v = torch.randn(2, seq_len, 2, 16, generator=generator)
    got = prefill.attend(q, k, v, scale=0.3, sliding_window=window, softcap=None)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([seq_len], dtype=torch.int32)
    sizes = {"page_size": seq_len, "num_qo_heads": 6, "num_kv_heads": 2, "head_dim": 16}
    plan = ops.plan_tree(table, lens, torch.tensor([q_len], dtype=torch.int32), **sizes)
    window_left = -1 if window is None else window - 1
    want, _ = reference.tree_attention(q, k[None], v[None], table, lens, plan, sm_scale=0.3, window_left=window_left)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("prefill_tokens", [512, 24])
def test_decoding_after_dense_prefills(name, prefill_tokens, monkeypatch):
    """The text is that of paged prefills, for whole prompts and pieces, beside short prompts and decoding rows."""
    adapter = TransformersModel(make_model(name))
    assert adapter.min_prefill is None  # on the CPU
    calls = []
    attend = prefill.attend

    def recorded(q, k, v, **options):
        calls.append((len(q), len(k)))
        return attend(q, k, v, **options)

    monkeypatch.setattr(prefill, "attend", recorded)
    tokens = []
    for adapter.min_prefill in (None, 8):
        dec = td.Decoder(adapter, kv_memory="16MiB", prefill_tokens=prefill_tokens)
        outs = dec.generate(PROMPTS, num_branches=2, sampling=GREEDY, max_new_tokens=12)
        tokens.append([[out.token_ids for out in branches] for branches in outs])
        dec.check_integrity()
    assert tokens[0] == tokens[1]
    assert calls
    assert any(q_len < seq_len for q_len, seq_len in calls) == (prefill_tokens == 24)


def test_supported_layers(monkeypatch):
    supports = prefill.supports
    half, plain = {"head_dim": 64, "dtype": torch.float16}, {"softcap": False, "sinks": False}
    monkeypatch.setattr(prefill, "flash_attention", lambda: None)
    assert supports(**half, **plain)
    assert not supports(**half, softcap=True, sinks=False)
    assert not supports(**half, softcap=False, sinks=True)
    monkeypatch.setattr(prefill, "flash_attention", lambda: object)
    assert supports(**half, softcap=True, sinks=False)
    assert not supports(head_dim=64, dtype=torch.float32, softcap=True, sinks=False)
    assert not supports(**half, softcap=True, sinks=True)
    with pytest.raises(ValueError, match="softcap"):
        prefill.attend(*torch.zeros(3, 2, 1, 8), scale=1.0, sliding_window=None, softcap=3.0)
