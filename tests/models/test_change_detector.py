"""A decoder follows changes of its model: it packs weights again, and drops keys and values from before."""

import pytest
import torch
from support.generate_cases import make_model
from torch import nn

import treedecode

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [5, 6, 7, 8, 9, 10, 11] * 4  # long enough to fill a page
GREEDY = treedecode.Sampling(temperature=0, ignore_eos=True)


class Adapter(nn.Module):
    """Adds a product to that of a linear layer; the addition can be switched off."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.on = True
        self.weight = nn.Parameter(0.3 * torch.randn(base.out_features, base.in_features))

    def forward(self, x):
        return self.base(x) + x @ self.weight.T if self.on else self.base(x)


class Negated(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return -self.base(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def add_adapters(model):
    for layer in model.model.layers:
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)


def switch_off(model):
    for layer in model.model.layers:
        layer.self_attn.v_proj.on = False


@torch.no_grad()
def scale_in_place(model):
    for parameter in model.parameters():
        parameter.mul_(1.3)


@torch.no_grad()
def change_embedding(model):
    model.model.embed_tokens.weight[5:30] += 0.7


def replace_weight(model):
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(-down.weight)


def wrap(model):
    mlp = model.model.layers[0].mlp
    mlp.down_proj = Negated(mlp.down_proj)


def change_class(model):
    model.model.layers[1].mlp.up_proj.__class__ = Doubled


def add_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: -2 * output)


def add_pre_hook(model):
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


def replace_forward(model):
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: -2 * own(x)


VISIBLE_CHANGES = [
    add_adapters,
    scale_in_place,
    change_embedding,
    replace_weight,
    wrap,
    change_class,
    add_hook,
    add_pre_hook,
    replace_forward,
]


def hide_in_embedding(model):
    model.model.embed_tokens.weight.data[5:30] += 0.7


def hide_in_head(model):
    model.lm_head.weight.data[3:40] *= -1


def plain(model, prompt=PROMPT, **options):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    return model.generate(ids, **options)[0, len(prompt) :].tolist()


def text(decoder):
    return decoder.generate(PROMPT, max_new_tokens=8, sampling=GREEDY)[0][0].token_ids


@pytest.mark.parametrize("change", VISIBLE_CHANGES)
def test_a_visible_change_is_followed(change):
    """Later calls, branches that were at rest and treedecode.generate give the changed model's text."""
    model = make_model()
    decoder = treedecode.Decoder(model)
    before = plain(model)
    assert text(decoder) == plain(model, custom_generate=treedecode.generate) == before
    with decoder.run(decoder.roots(PROMPT, sampling=GREEDY)) as roots:
        decoder.run(roots.extend(max_new_tokens=3))
        change(model)
        after = plain(model)
        assert after != before
        assert text(decoder) == plain(model, custom_generate=treedecode.generate) == after
        decoder.run(roots.extend(max_new_tokens=5))
        assert roots.token_ids()[0] == before[:3] + plain(model, PROMPT + before[:3], max_new_tokens=5)
    assert plain(model) == after  # the change is still there
    decoder.check_integrity()


@pytest.mark.parametrize("change", [switch_off, hide_in_embedding, hide_in_head])
def test_reset_follows_changes_that_cannot_be_seen(change):
    model = make_model()
    add_adapters(model)
    decoder = treedecode.Decoder(model)
    before = text(decoder)
    assert before == plain(model)
    change(model)
    decoder.reset()
    assert text(decoder) == plain(model) != before
    decoder.check_integrity()


def test_generate_follows_changes_that_cannot_be_seen():
    model = make_model()
    add_adapters(model)
    before = plain(model)
    assert plain(model, custom_generate=treedecode.generate) == before
    switch_off(model)
    assert plain(model, custom_generate=treedecode.generate) == plain(model) != before


def test_an_unchanged_model_keeps_its_prefixes():
    model = make_model()
    decoder = treedecode.Decoder(model)
    for _ in range(2):
        text(decoder)
    assert decoder.model.num_changes == 0
    assert decoder.stats.num_prefix_tokens > 0
