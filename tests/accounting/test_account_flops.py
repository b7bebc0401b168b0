"""FLOPs of an account: what the model's weights and lengths say against operations counted as they run."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import treedecode as td
from treedecode.models.flops import product_flops

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def count(run, model):
    """Operations of products while `run` runs; the angles of rotations, an outer product, are none of them."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    counts = counter.get_flop_counts()
    return sum(counts["Global"].values()) - sum(
        sum(ops.values()) for name, ops in counts.items() if name.endswith("rotary_emb")
    )


def chain_flops(model, num_prompt, num_new):
    """A prompt, and so many new tokens, each token on its own: logits where one is sampled."""
    cache, body, total = DynamicCache(config=model.config), model.get_decoder(), 0
    for at in range(num_prompt + num_new - 1):
        found = []
        token = torch.tensor([[at % 50]])
        total += count(lambda token=token, found=found: found.append(body(token, past_key_values=cache)), model)
        if at >= num_prompt - 1:
            total += count(lambda found=found: model.lm_head(found[0].last_hidden_state), model)
    return total


def test_flops_are_those_counted_as_they_run():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, attn_implementation="eager")).eval()
    want = chain_flops(model, 7, 6)
    sampling = td.Sampling(seed=0, ignore_eos=True)

    async def search(decoder, account):
        with await decoder.roots([list(range(2, 9))], sampling=sampling, account=account) as root:
            await root.extend(max_new_tokens=2)
            await root.extend(max_new_tokens=4)

    with td.Decoder(model, page_size=4, kv_memory="1MiB") as decoder:
        account = decoder.engine.meter.open()
        decoder.run(search(decoder, account))
        assert decoder.engine.meter.close(account).flops == want


def test_of_a_layer_of_experts_those_count_that_a_token_goes_through():
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=6, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    attention, expert, router = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 48, 32 * 6
    assert product_flops(model, config) == (2 * 2 * (attention + 2 * expert + router), 2 * 50 * 32)
