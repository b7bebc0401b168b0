"""Rotations of all kinds give each prompt its own tokens, whoever shares the batch, or are refused by name."""

import pytest
import torch
from support.generate_cases import VOCAB
from transformers import AutoConfig, AutoModelForCausalLM

import treedecode
from treedecode.models.supported import check_supported
from treedecode.models.transformers import TransformersModel

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 48
FACTORS = {
    "short_factor": [1.0, 1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0],
    "long_factor": [1.5, 2.0, 3.0, 6.0, 9.0, 12.0, 20.0, 32.0],
}
ROPES = {
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT} | FACTORS,
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": LIMIT},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": LIMIT,
    },
}  # fmt: skip
CASES = [("llama", rope) for rope in ROPES] + [("phi3", "longrope")]


def make_model(name, rope):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LIMIT if rope == "dynamic" else 4 * LIMIT,
        original_max_position_embeddings=LIMIT, rope_parameters=ROPES[rope], pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def alone(model, prompt, **options):
    out = model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("name", "rope"), CASES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_prompt_has_its_own_tokens(name, rope, num_beams):
    model = make_model(name, rope)
    prompts = prompts_of(4, 40, 17, 33)
    want = [alone(model, prompt, max_new_tokens=8, num_beams=num_beams) for prompt in prompts]
    with treedecode.Decoder(model, kv_memory="8MiB", prefill_tokens=16) as decoder:  # the prefill comes in chunks
        for _ in range(2):  # the second time from the prefix index
            if num_beams > 1:
                outs = decoder.beam_search(prompts, num_beams=num_beams, max_new_tokens=8)
            else:
                outs = decoder.generate(prompts, sampling=treedecode.Sampling(temperature=0), max_new_tokens=8)
            assert [out[0].token_ids for out in outs] == want
    for prompt, tokens in zip(prompts, want, strict=True):
        options = {"max_new_tokens": 8, "num_beams": num_beams, "custom_generate": treedecode.generate}
        assert alone(model, prompt, **options) == tokens


@pytest.mark.parametrize(("name", "rope"), [("llama", "longrope"), ("phi3", "longrope")])
def test_longer_sequences_are_refused_by_name(name, rope):
    model = make_model(name, rope)
    assert TransformersModel(model).max_position == LIMIT
    (prompt,) = prompts_of(LIMIT - 4)
    with treedecode.Decoder(model, kv_memory="8MiB") as decoder:
        with pytest.raises(ValueError, match=r"^max_new_tokens: .*beyond 48 tokens its longrope rotations depend"):
            decoder.generate([prompt], max_new_tokens=6)
        with pytest.raises(ValueError, match=r"^prompts\[0\]: .*beyond 48 tokens its longrope rotations depend"):
            decoder.generate(prompts_of(LIMIT + 1), max_new_tokens=5)
        [[out]] = decoder.generate([prompt], max_new_tokens=5, sampling=treedecode.Sampling(temperature=0))
        assert out.token_ids == alone(model, prompt, max_new_tokens=5), "the last token is not rotated"
    assert alone(model, prompt, max_new_tokens=5, custom_generate=treedecode.generate) == out.token_ids
    with pytest.raises(ValueError, match=r"^max_new_tokens: .*beyond 48 tokens its longrope rotations depend"):
        alone(model, prompt, max_new_tokens=6, custom_generate=treedecode.generate)


def test_queries_scaled_by_their_place_in_a_forward_are_refused():
    model = make_model("llama", "linear")
    attention = model.model.layers[1].self_attn
    attention.attn_temperature_tuning, attention.use_rope = True, False
    with pytest.raises(ValueError, match=r"attn_temperature_tuning"):
        check_supported(model)
    attention.use_rope = True
    check_supported(model)
