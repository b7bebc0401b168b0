"""Beam search against `generate` of Transformers on random tiny models, driven by recomputing whole texts."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

from treedecode.decoding.beams import Beams, BeamSearch

VOCAB = 67


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(seed, eos=(), eos_bias=0.0):
    """A model whose next-token distribution is peaked enough that beams diverge, and likes `eos` as much as told."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head = torch.nn.Linear(32, VOCAB)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.25)
        model.lm_head.bias.zero_()
        model.lm_head.bias[list(eos)] = eos_bias
    model.generation_config.pad_token_id = 0
    return model


def make_prompts(batch, seed):
    """Left-padded prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, 6), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(1, batch):
        ids[i, : 2 * i] = 0
        mask[i, : 2 * i] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits_of(model, texts):
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=position).logits[:, -1].float()


def search(model, inputs, settings, **step_options):
    """All hypotheses of each prompt, and the number of steps."""
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]
    beams = Beams(settings, len(prompts))
    texts = list(prompts)
    seen = []
    while beams.num_rows:
        assert beams.num_rows == len(texts)
        step = beams.step(logits_of(model, texts), **step_options)
        texts = [texts[p] + [t] for p, t in zip(step.parent.tolist(), step.token.tolist(), strict=True)]
        seen += step.finished
    assert sorted(seen) == list(range(len(prompts)))
    return [beams.results(group) for group in range(len(prompts))], beams.num_steps


def check(model, inputs, *, num_return_sequences=None, stop=None, **options):
    """Token for token, score for score and beam for beam what `generate` returns."""
    num_beams = options["num_beams"]
    count = num_return_sequences or num_beams
    extra = {"custom_generate": type(model)._beam_search} if num_beams == 1 else {}
    want = model.generate(
        **inputs,
        **options,
        **extra,
        num_return_sequences=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    eos = options["eos_token_id"] or []
    settings = BeamSearch(
        num_beams=num_beams,
        max_new_tokens=options["max_new_tokens"],
        eos_token_ids=tuple(eos if isinstance(eos, list) else [eos]),
        length_penalty=options.get("length_penalty", 1.0),
        early_stopping=options.get("early_stopping", False),
        min_new_tokens=options.get("min_new_tokens", 0),
    )
    results, num_steps = search(model, inputs, settings, stop=stop)
    assert num_steps == len(want.scores)
    prompt_len = inputs["input_ids"].shape[1]
    for i, (sequence, score, beam_indices) in enumerate(
        zip(want.sequences, want.sequences_scores, want.beam_indices, strict=True)
    ):
        group = i // count
        got = results[group][i % count]
        length = int((beam_indices >= 0).sum())
        assert got.token_ids.tolist() == sequence[prompt_len : prompt_len + length].tolist(), i
        assert (got.beams + group * num_beams).tolist() == beam_indices[:length].tolist(), i
        # The log-probs come from two forward passes that differ in rounding (cached against recomputed).
        assert abs(got.score - float(score)) <= 1e-5 * max(1.0, abs(float(score))), i


@pytest.mark.parametrize("eos", [3, [3, 11, 40]], ids=str)
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [1, 2, 3, 4, 8])
def test_equals_generate(num_beams, length_penalty, early_stopping, eos):
    cell = num_beams + int(10 * length_penalty)
    model = make_model(cell, eos if isinstance(eos, list) else [eos], eos_bias=2.0)
    check(
        model,
        make_prompts(1 + cell % 3, seed=cell),
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos_token_id=eos,
        max_new_tokens=9,
        num_return_sequences=1 + cell % num_beams,
    )


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("eos_bias", [-3.0, 0.0, 3.0, 5.0, 9.0])
def test_equals_generate_however_likely_eos_is(eos_bias, early_stopping):
    """From no EOS at all to steps where every beam's best token is one."""
    for seed in range(3):
        model = make_model(seed, [3, 11], eos_bias)
        options = {"num_beams": 3, "early_stopping": early_stopping, "eos_token_id": [3, 11]}
        check(model, make_prompts(3, seed), max_new_tokens=12, **options)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
@pytest.mark.parametrize("eos", [None, 3])
def test_equals_generate_for_few_tokens(max_new_tokens, eos):
    model = make_model(5, [3], eos_bias=2.0)
    for num_beams in (1, 2, 5):
        check(model, make_prompts(2, 0), num_beams=num_beams, eos_token_id=eos, max_new_tokens=max_new_tokens)


def test_equals_generate_with_min_new_tokens():
    for seed in range(4):
        model = make_model(seed, [3, 63], eos_bias=3.0)
        options = {"num_beams": 4, "eos_token_id": [3, 63], "length_penalty": -1.0}
        check(model, make_prompts(2, seed), min_new_tokens=4, max_new_tokens=8, **options)


def scripted(beams, steps):
    """Feeds logits given as {row: {token: log-prob}} over a vocabulary of 10; everything else is very unlikely."""
    out = []
    for step in steps:
        logits = torch.full((beams.num_rows, 10), -50.0)
        for row, tokens in step.items():
            for token, logprob in tokens.items():
                logits[row, token] = logprob
        out.append(beams.step(logits, is_logprobs=True))
    return out


def texts(beams, group=0):
    return [(hyp.token_ids.tolist(), round(hyp.score, 4)) for hyp in beams.results(group)]


def test_backpointers_give_the_text_of_reordered_beams():
    beams = Beams(BeamSearch(num_beams=2, max_new_tokens=3), 1)
    first, second, third = scripted(
        beams, [{0: {4: -1.0, 5: -2.0}}, {0: {6: -9.0}, 1: {7: -1.0, 8: -1.5}}, {0: {1: -1.0}, 1: {2: -0.25}}]
    )
    assert (first.parent.tolist(), first.token.tolist(), first.row.tolist()) == ([0, 0], [4, 5], [0, -1])
    assert (second.parent.tolist(), second.token.tolist(), second.row.tolist()) == ([1, 1], [7, 8], [0, 1])
    assert third.finished == [0]
    assert len(third.parent) == 0
    assert texts(beams) == [([5, 8, 2], -1.25), ([5, 7, 1], -1.3333)]
    assert [hyp.beams.tolist() for hyp in beams.results(0)] == [[0, 1, 1], [0, 1, 0]]
    logprobs = [hyp.logprobs.tolist() for hyp in beams.results(0)]
    assert logprobs == [pytest.approx([-2.0, -1.5, -0.25], abs=1e-6), pytest.approx([-2.0, -1.0, -1.0], abs=1e-6)]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("num_ends", [20, 50, 64])
def test_equals_generate_when_most_tokens_end_a_beam(num_ends, early_stopping):
    """Steps in which fewer than `num_beams` candidates go on, or none, before anything else ends the search."""

    class EndsIn(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] < num_ends

    for seed in range(4):
        model = make_model(seed, [3], eos_bias=0.0)
        check(
            model,
            make_prompts(3, seed),
            stop=lambda parent, token: token < num_ends,
            stopping_criteria=[EndsIn()],
            num_beams=4,
            early_stopping=early_stopping,
            eos_token_id=3,
            max_new_tokens=6,
        )


def test_all_candidates_eos_ends_the_search():
    beams = Beams(BeamSearch(num_beams=2, max_new_tokens=9, eos_token_ids=(3,), early_stopping="never"), 1)
    scripted(beams, [{0: {4: -1.0, 5: -2.0}}])
    only_eos = torch.full((2, 10), -math.inf)
    only_eos[:, 3] = -0.5
    assert beams.step(only_eos, is_logprobs=True).finished == [0]
    assert texts(beams) == [([4, 3], -0.75), ([5, 3], -1.25)]


def test_a_finished_search_leaves_and_the_others_keep_their_texts():
    """Group 1 of 3 ends first; back-pointers of the others must survive the removal of its rows."""
    settings = BeamSearch(num_beams=2, max_new_tokens=4, eos_token_ids=(3,), early_stopping=True)
    beams = Beams(settings, 3)
    start = {row: {4 + row: -1.0, 7 + row: -1.5} for row in range(3)}
    go_on = {row: {8: -1.0, 9: -1.25} for row in (0, 1, 4, 5)}
    end = {2: {3: -0.5}, 3: {3: -0.5}}
    step = scripted(beams, [start, go_on | end])[-1]
    assert step.finished == [1]
    assert beams.groups.tolist() == [0, 2]
    assert step.row.tolist() == [0, 1, 4, 5]
    assert step.parent.tolist() == [0, 0, 4, 4]
    assert step.token.tolist() == [8, 9, 8, 9]
    step = scripted(beams, [{0: {1: -1.0}, 1: {1: -1.0}, 2: {3: -0.5}, 3: {3: -0.5}}])[-1]
    assert step.finished == [2]
    assert scripted(beams, [{0: {3: -0.5}, 1: {3: -0.5}}])[-1].finished == [0]
    assert texts(beams, 1) == [([5, 3], -0.75), ([8, 3], -1.0)]
    assert texts(beams, 2) == [([6, 8, 3], -0.8333), ([6, 9, 3], -0.9167)]
    assert texts(beams, 0) == [([4, 8, 1, 3], -0.875), ([4, 9, 1, 3], -0.9375)]


def test_groups_of_different_width_equal_separate_searches():
    torch.manual_seed(0)
    widths = [1, 4, 2]
    tables = torch.randn(3, 10, 10).mul(2)  # next-token logits by last token

    def run(groups):
        beams = Beams(
            BeamSearch(num_beams=9, max_new_tokens=6, eos_token_ids=(3,)),
            len(groups),
            num_beams=[widths[g] for g in groups],
        )
        last = torch.zeros(len(groups), dtype=torch.int64)
        while beams.num_rows:
            group = torch.tensor(groups)[beams.groups]
            if beams.num_steps:
                group = group.repeat_interleave(torch.tensor(widths)[group])
            last = beams.step(tables[group, last]).token
        return [texts(beams, i) for i in range(len(groups))]

    together = run([0, 1, 2])
    assert [len(hyps) for hyps in together] == widths
    assert together == [run([group])[0] for group in range(3)]


def test_stop_is_asked_about_candidates_and_makes_hits():
    beams = Beams(BeamSearch(num_beams=2, max_new_tokens=5, early_stopping=True), 1)
    asked = []

    def stop(parent, token):
        asked.append((parent.tolist(), token.tolist()))
        return token == 7

    logits = torch.full((1, 10), -50.0)
    logits[0, [4, 7, 5]] = torch.tensor([-1.0, -2.0, -3.0])
    step = beams.step(logits, is_logprobs=True, stop=stop)
    assert asked == [([[0, 0, 0, 0]], [[4, 7, 5, 0]])]
    assert step.token.tolist() == [4, 5]


def test_steps_cost_the_same_however_long_the_texts_are():
    beams = Beams(BeamSearch(num_beams=4, max_new_tokens=50), 2)
    scripted(beams, [{}] * 20)
    assert {len(row) for row in beams._tokens + beams._parents} == {8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected an int >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an int >= 1, got 0"),
        ({"early_stopping": "always"}, "early_stopping: expected False, True or 'never', got 'always'"),
        ({"length_penalty": math.nan}, "length_penalty: expected a finite number, got nan"),
        ({"eos_token_ids": (-1,)}, r"eos_token_ids: expected token ids, got \(-1,\)"),
        ({"min_new_tokens": -1}, "min_new_tokens: expected an int >= 0, got -1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        BeamSearch(**{"num_beams": 2, "max_new_tokens": 4} | change)


def test_bad_calls():
    with pytest.raises(ValueError, match="num_groups: expected at least 1, got 0"):
        Beams(BeamSearch(num_beams=2, max_new_tokens=1), 0)
    with pytest.raises(ValueError, match=r"num_beams: expected 2 numbers >= 1, got \[3\]"):
        Beams(BeamSearch(num_beams=2, max_new_tokens=1), 2, num_beams=[3])
    beams = Beams(BeamSearch(num_beams=2, max_new_tokens=1), 2)
    with pytest.raises(ValueError, match=r"logits: expected shape \[num_rows, vocab_size\] = \[2, \*\], got \[3, 10\]"):
        beams.step(torch.zeros(3, 10))
    with pytest.raises(ValueError, match="group: 0 is still running"):
        beams.results(0)
    beams.step(torch.zeros(2, 10))
    assert np.array_equal(beams.results(1)[0].token_ids, [0])
    with pytest.raises(ValueError, match="logits: every search has finished"):
        beams.step(torch.zeros(0, 10))
