"""Tiny random models and prompts for the tests of `treedecode.generate` beside `model.generate`."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

VOCAB = 97
EXTRA = {"llama": {}, "qwen2": {}, "gemma2": {"sliding_window": 5, "final_logit_softcapping": 9.0}}


def make_model(name="llama", seed=0, eos=(), eos_bias=0.0):
    """A model peaked enough that rounding decides nothing; `eos_bias` sets how likely the tokens `eos` are."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        name,
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
        **EXTRA[name],
    )
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config).eval()
    model.lm_head = torch.nn.Linear(48, VOCAB)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.25)
        model.lm_head.bias.zero_()
        model.lm_head.bias[list(eos)] = eos_bias
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model


def make_inputs(batch=3, seed=0):
    """Prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, 7), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(1, batch):
        ids[i, : 2 * i] = 0
        mask[i, : 2 * i] = 0
    return {"input_ids": ids, "attention_mask": mask}
