"""`treedecode.generate` in `model.generate(custom_generate=...)`, against `generate` itself on tiny random models."""

import copy
import gc
import pickle
import weakref

import pytest
import tokenizers
import torch
from support.generate_cases import EXTRA, VOCAB, make_inputs, make_model
from transformers import (
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StopStringCriteria,
)

import treedecode
from treedecode.integrations import transformers as integration

pytestmark = pytest.mark.usefixtures("one_thread")


def same(model, inputs, **options):
    """Both results, which must be equal; the decoder has leaked nothing."""
    want = model.generate(**inputs, **options)
    got = model.generate(**inputs, **options, custom_generate=treedecode.generate)
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype
        assert got.tolist() == want.tolist()
    else:
        assert got.sequences.tolist() == want.sequences.tolist()
    decoder = vars(model)["_treedecode"].decoder
    decoder.check_integrity()
    assert decoder.num_branches == 0
    return got, want


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("eos", [None, 2, [2, 5]], ids=str)
def test_greedy(name, eos):
    for seed in range(3):
        model = make_model(name, seed, eos=(2, 5), eos_bias=1.5)
        same(model, make_inputs(1 + seed, seed), max_new_tokens=12, do_sample=False, eos_token_id=eos)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"min_new_tokens": 5},
        {"min_length": 11},
        {"max_length": 15},
        {"min_new_tokens": 4, "eos_token_id": [5, 9]},
        {"repetition_penalty": 1.5, "min_new_tokens": 3, "eos_token_id": [2, 7], "pad_token_id": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_processors(options, num_beams):
    model = make_model("llama", 1, eos=(2, 5, 7, 9), eos_bias=2.0)
    for seed in range(3):
        limit = {} if "max_length" in options else {"max_new_tokens": 10}
        inputs = make_inputs(3, seed)
        ids = inputs["input_ids"]
        if "repetition_penalty" in options:  # padding by a token of the prompt, see the next test
            ids[:] = ids.where(inputs["attention_mask"] == 1, ids[:, -1:])
        same(model, inputs, do_sample=False, num_beams=num_beams, **limit, **options)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_is_not_penalised(num_beams):
    """`generate` counts the padding as tokens of the prompt: there a text depends on who shares its batch."""
    model = make_model("llama", 1)
    options = {"repetition_penalty": 3.0, "max_new_tokens": 6, "num_beams": num_beams, "do_sample": False}
    inputs, texts = make_inputs(3), []
    for row, ids in enumerate(inputs["input_ids"]):
        alone = {name: x[row : row + 1, 2 * row :] for name, x in inputs.items()}
        texts.append(model.generate(**alone, **options)[0, ids.shape[0] - 2 * row :].tolist())
        ids[: 2 * row] = texts[-1][0]  # a token that would come out otherwise
    got = model.generate(**inputs, **options, custom_generate=treedecode.generate)
    assert [row[: len(text)] for row, text in zip(got[:, 7:].tolist(), texts, strict=True)] == texts


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 3, 4, 8])
def test_beam_search(num_beams, length_penalty, early_stopping):
    cell = num_beams + int(10 * length_penalty)
    eos = [2, [2, 5], [2, 5, 11]][cell % 3]
    model = make_model(["llama", "qwen2"][cell % 2], cell, eos=(2, 5, 11), eos_bias=2.0)
    got, want = same(
        model,
        make_inputs(1 + cell % 3, cell),
        num_beams=num_beams,
        num_return_sequences=1 + cell % num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        eos_token_id=eos,
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # Two forwards that round differently, ten log-probs added up.
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, rtol=1e-5, atol=1e-5)
    assert got.beam_indices.tolist() == want.beam_indices.tolist()


@pytest.mark.parametrize("max_new_tokens", [1, 2])
@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_few_tokens(num_beams, max_new_tokens):
    model = make_model(eos=(2,), eos_bias=2.0)
    same(model, make_inputs(), num_beams=num_beams, max_new_tokens=max_new_tokens, do_sample=False)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("eos", [-1, VOCAB, 1000, [-1, 2, VOCAB]], ids=str)
def test_end_tokens_outside_of_the_vocabulary(eos, num_beams):
    model = make_model(eos=(2, VOCAB - 1), eos_bias=2.0)
    options = {"max_new_tokens": 10, "num_beams": num_beams, "do_sample": False, "pad_token_id": 0}
    same(model, make_inputs(), **options, eos_token_id=eos, min_new_tokens=2)
    same(model, make_inputs(), **options, eos_token_id=eos, stopping_criteria=[EndsAfter()])
    model.generation_config.eos_token_id = eos
    same(model, make_inputs(), **options)


@pytest.mark.parametrize("eos", [None, 2])
def test_more_beams_than_texts(eos):
    model = make_model()
    model.lm_head = torch.nn.Linear(48, 7)
    model.config.vocab_size = 7
    options = {"num_beams": 8, "num_return_sequences": 8, "max_new_tokens": 1, "do_sample": False, "eos_token_id": eos}
    inputs = {name: tensor % 7 for name, tensor in make_inputs(2).items()}
    got, want = same(model, inputs, **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(got.beam_indices, want.beam_indices)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, rtol=1e-5, atol=1e-5)


def test_padding_of_beams_when_the_padding_token_is_not_0():
    model = make_model(seed=4, eos=(2,), eos_bias=4.0)
    for pad in (0, 13):
        same(model, make_inputs(), num_beams=3, max_new_tokens=9, do_sample=False, pad_token_id=pad)


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 0},
        {"top_k": 0, "temperature": 0.6},
        {"top_k": 12, "temperature": 1.5},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "min_p": 0.08},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.2},
        {"repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_sampling_draws_from_the_same_distribution(filters):
    model = make_model(seed=2)
    inputs = make_inputs(1)
    options = {"do_sample": True, "max_new_tokens": 1, **filters}
    scores = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True).scores[0][0]
    expected = scores.double().softmax(0)
    torch.manual_seed(11)
    drawn = model.generate(**inputs, **options, num_return_sequences=4000, custom_generate=treedecode.generate)[:, -1]
    observed = torch.bincount(drawn, minlength=VOCAB).double()
    assert observed[expected == 0].sum() == 0
    often = expected * 4000 >= 5  # the rule for when the statistic is chi-square; the others count as one
    bins = [
        (observed[often], 4000 * expected[often]),
        (observed[~often].sum()[None], 4000 * expected[~often].sum()[None]),
    ]
    seen, mean = (torch.cat(parts) for parts in zip(*bins, strict=True))
    chi_square = ((seen - mean)[mean > 0] ** 2 / mean[mean > 0]).sum()
    degrees = int((mean > 0).sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_sampling_repeats_under_manual_seed():
    model = make_model(seed=2)
    inputs = make_inputs(2)

    def draw(seed):
        torch.manual_seed(seed)
        return model.generate(
            **inputs, do_sample=True, num_return_sequences=4, max_new_tokens=8, custom_generate=treedecode.generate
        ).tolist()

    first = draw(0)
    assert draw(0) == first
    assert draw(1) != first
    assert len({tuple(row) for row in first[:4]}) == 4
    for i, row in enumerate(first):
        assert row[:7] == inputs["input_ids"][i // 4].tolist()


def test_sampling_ends_at_eos_and_pads():
    torch.manual_seed(0)
    model = make_model(seed=2, eos=(2, 5), eos_bias=4.0)
    for eos in (2, [5], [2, 5]):
        ends = {eos} if isinstance(eos, int) else set(eos)
        options = {"do_sample": True, "num_return_sequences": 20, "max_new_tokens": 9, "eos_token_id": eos}
        out = model.generate(**make_inputs(2), **options, pad_token_id=0, custom_generate=treedecode.generate)
        ended = 0
        for new in out[:, 7:].tolist():
            at = next((i for i, token in enumerate(new) if token in ends), len(new))
            assert new[at + 1 :] == [0] * len(new[at + 1 :])
            ended += at < len(new)
        assert ended > 10


def test_model_is_left_as_it_was():
    model = make_model()
    before = model.config._attn_implementation
    names, inputs = list(model.state_dict()), make_inputs()
    want = model(**inputs).logits
    same(model, inputs, max_new_tokens=3, do_sample=False)
    assert model.config._attn_implementation == before
    assert list(model.state_dict()) == names
    assert torch.equal(model(**inputs).logits, want)
    assert "_treedecode" not in vars(pickle.loads(pickle.dumps(model))) or not vars(copy.deepcopy(model))["_treedecode"]
    same(copy.deepcopy(model), inputs, max_new_tokens=3, do_sample=False)


def test_one_decoder_per_model_that_dies_with_it():
    model = make_model()
    inputs = make_inputs()
    same(model, inputs, max_new_tokens=3, do_sample=False)
    decoder = vars(model)["_treedecode"].decoder
    same(model, inputs, max_new_tokens=5, num_beams=2, do_sample=False)
    assert vars(model)["_treedecode"].decoder is decoder
    gone = weakref.ref(decoder)
    del model, decoder
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("through_data", [False, True])
def test_changed_weights_are_seen(through_data):
    """Neither pages of earlier prompts nor repacked weights may survive a training step."""
    model = make_model(seed=3)
    inputs = make_inputs()
    before = same(model, inputs, max_new_tokens=8, do_sample=False)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.data if through_data else parameter).mul_(1.2).add_(0.01)
    after = same(model, inputs, max_new_tokens=8, do_sample=False)[0]
    assert after.tolist() != before.tolist()


class EndsAfter(StoppingCriteria):
    """Stops a branch whose last two tokens, prompt included, add up to a multiple of five."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -2:].sum(1) % 5 == 0


@pytest.mark.parametrize("eos", [None, 2, [2, 5]])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_stopping_criteria(num_beams, eos):
    model = make_model(seed=3, eos=(2, 5), eos_bias=1.5)
    options = {"max_new_tokens": 10, "num_beams": num_beams, "do_sample": False, "eos_token_id": eos}
    for seed in range(3):
        for more in ({}, {"min_new_tokens": 4}, {"repetition_penalty": 1.3, "pad_token_id": 7}):
            same(model, make_inputs(3, seed), stopping_criteria=[EndsAfter()], **options, **more)


def test_more_prompts_with_stopping_criteria_than_a_decoder_usually_holds():
    ids = torch.arange(300)[:, None] % 20 + 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    same(make_model(), inputs, do_sample=False, max_new_tokens=2, max_time=1e6)


def test_stopping_criteria_when_sampling():
    """The texts are those without the criterion, cut where it says."""
    model = make_model(seed=3)
    options = {"do_sample": True, "num_return_sequences": 5, "max_new_tokens": 12, "pad_token_id": 0}
    drawn = []
    for criteria in ([], [EndsAfter()]):
        torch.manual_seed(5)
        drawn.append(
            model.generate(
                **make_inputs(2), **options, stopping_criteria=criteria, custom_generate=treedecode.generate
            ).tolist()
        )
    for free, cut in zip(*drawn, strict=True):
        ended = [i for i in range(7, len(free)) if sum(free[i - 1 : i + 1]) % 5 == 0 or free[i] == 2]
        until = ended[0] + 1 if ended else len(free)
        assert cut[:until] == free[:until]
        assert not any(cut[until:])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_stop_strings(num_beams):
    vocab = {chr(97 + i % 26) + (chr(97 + i // 26) if i >= 26 else ""): i for i in range(VOCAB)}  # a letter or two
    letters = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    letters.decoder = tokenizers.decoders.Fuse()
    tokenizer, strings = PreTrainedTokenizerFast(tokenizer_object=letters), ["b", "za", "xc"]
    criteria = [StopStringCriteria(tokenizer, strings)]
    for seed in range(3):
        model, options = make_model(seed=seed), {"max_new_tokens": 9, "num_beams": num_beams}
        got, _ = same(model, make_inputs(2, seed), stopping_criteria=criteria, **options)
        again, _ = same(model, make_inputs(2, seed), stop_strings=strings, tokenizer=tokenizer, **options)
        assert got.tolist() == again.tolist()
        same(model, make_inputs(2, seed), tokenizer=tokenizer, **options)
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        model.generate(**make_inputs(2), stop_strings=strings, custom_generate=treedecode.generate)


def test_max_time():
    model = make_model()
    for num_beams in (1, 3):
        out = same(model, make_inputs(), num_beams=num_beams, max_new_tokens=20, max_time=0.0, do_sample=False)[0]
        assert out.shape[1] == 8


def test_kv_memory_is_passed_on():
    model = make_model()
    inputs = make_inputs()
    with pytest.raises(ValueError, match="kv_memory"):
        model.generate(**inputs, max_new_tokens=2, kv_memory=10, custom_generate=treedecode.generate)
    want = model.generate(**inputs, max_new_tokens=20, num_beams=6)
    got = model.generate(
        **inputs, max_new_tokens=20, num_beams=6, kv_memory="400kb", custom_generate=treedecode.generate
    )
    assert got.tolist() == want.tolist()
    assert vars(model)["_treedecode"].decoder.engine.pool.kv.nbytes <= 400_000


def test_quantised_layers():
    """Their state holds more than tensors."""
    quantised = torch.ao.quantization.quantize_dynamic(make_model(), {torch.nn.Linear})
    same(quantised, make_inputs(), max_new_tokens=8, do_sample=False)


def test_public_name():
    assert treedecode.generate is integration.generate
    assert treedecode.generate is integration.generate  # the second look-up must not find a module of that name
