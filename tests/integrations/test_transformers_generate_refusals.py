"""`treedecode.generate` refuses arguments that it does not honour, by name."""

import pytest
import torch
from support.generate_cases import VOCAB, make_inputs, make_model
from transformers import DynamicCache, LogitsProcessorList, T5Config, T5ForConditionalGeneration
from transformers.generation import BaseStreamer, LogitsProcessor, RepetitionPenaltyLogitsProcessor

import treedecode

pytestmark = pytest.mark.usefixtures("one_thread")


class Halve(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores / 2


class Silent(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha: 0.6 is not supported"),
        ({"num_beam_groups": 2, "num_beams": 4}, "num_beam_groups: 2 is not supported"),
        ({"constraints": [object()], "num_beams": 2}, "constraints: .* is not supported"),
        ({"force_words_ids": [[3]], "num_beams": 2}, "force_words_ids: .* is not supported"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size: 2 is not supported"),
        ({"bad_words_ids": [[4]]}, r"bad_words_ids: \[\[4\]\] is not supported"),
        ({"suppress_tokens": [4]}, r"suppress_tokens: \[4\] is not supported"),
        ({"sequence_bias": [[[4], 1.0]]}, "sequence_bias: .* is not supported"),
        ({"guidance_scale": 1.5}, "guidance_scale: 1.5 is not supported"),
        ({"typical_p": 0.5, "do_sample": True}, "typical_p: 0.5 is not supported"),
        ({"epsilon_cutoff": 0.01, "do_sample": True}, "epsilon_cutoff: 0.01 is not supported"),
        ({"renormalize_logits": True}, "renormalize_logits: True is not supported"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id: 2 is not supported"),
        ({"exponential_decay_length_penalty": (3, 1.1)}, "exponential_decay_length_penalty: .* is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: 3 is not supported"),
        ({"output_logits": True, "return_dict_in_generate": True, "num_beams": 2}, "output_logits: not supported"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states: True is"),
        ({"do_sample": True, "num_beams": 2}, "do_sample: sampling with num_beams > 1"),
        ({"logits_processor": LogitsProcessorList([Halve()])}, "logits_processor: Halve is not supported"),
        (
            {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)])},
            "logits_processor: RepetitionPenaltyLogitsProcessor is not supported",
        ),
        (
            {"prefix_allowed_tokens_fn": lambda batch, ids: [3, 4]},
            "logits_processor: PrefixConstrainedLogitsProcessor is not supported",
        ),
        ({"max_new_tokens": 200}, "max_new_tokens: 200 after a prompt of 7 tokens is more than the model's 128"),
        ({"inputs_embeds": torch.zeros(2, 3, 48), "input_ids": None}, "inputs_embeds: is not|input_ids: expected"),
        ({"position_ids": torch.arange(7).expand(2, 7) + 1}, "position_ids: expected those of the attention mask"),
        ({"attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}, "attention_mask: expected padding"),
        ({"attention_mask": torch.tensor([[1] * 7, [0] * 7])}, "attention_mask: expected padding on the left"),
        ({"max_new_tokens": 123}, "max_new_tokens: 123 after a prompt of 7 tokens is more than the model's 128"),
        ({"assistant_model": make_model(seed=1)}, "assistant_model: is not supported"),
        ({"token_type_ids": torch.zeros(2, 7, dtype=torch.int64)}, "token_type_ids"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_refuses_by_name(options, message):
    model = make_model()
    inputs = make_inputs(2) | {"max_new_tokens": 4} | options
    if inputs["input_ids"] is None:
        inputs |= {"input_ids": None, "attention_mask": None}
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, custom_generate=treedecode.generate)


def test_caches():
    """An empty one changes nothing; what a filled one holds would be missing from the text."""
    model, inputs = make_model(), make_inputs(2)
    options = {"max_new_tokens": 4, "custom_generate": treedecode.generate}
    want = model.generate(**inputs, max_new_tokens=4)
    cache = DynamicCache()
    assert model.generate(**inputs, **options, past_key_values=cache).tolist() == want.tolist()
    model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="a filled cache is not supported"):
        model.generate(**inputs, **options, past_key_values=cache)


def test_refuses_models():
    model = make_model().train()
    with pytest.raises(ValueError, match="training mode"):
        model.generate(**make_inputs(), max_new_tokens=2, custom_generate=treedecode.generate)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM are on the meta device"):
        make_model().to("meta").generate(**make_inputs(), max_new_tokens=2, custom_generate=treedecode.generate)
    t5 = T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="encoder"):
        t5.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2, custom_generate=treedecode.generate)
