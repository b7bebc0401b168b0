"""The FLOPs of an account, from weights and lengths, are those that torch counts as they run."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import treedecode as td
from treedecode.models.flops import product_flops

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def count(run, model):
    """Counts the operations of products in `run`, without the outer products for angles of rotations."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    counts = counter.get_flop_counts()
    return sum(counts["Global"].values()) - sum(
        sum(ops.values()) for name, ops in counts.items() if name.endswith("rotary_emb")
    )


def chain_flops(model, num_prompt, num_new):
    """Counts the operations of decoding token by token, with logits where a token is sampled."""
    cache, body, total = DynamicCache(config=model.config), model.get_decoder(), 0
    for position in range(num_prompt + num_new - 1):
        outputs = []
        token = torch.tensor([[position % 50]])
        total += count(lambda token=token, outputs=outputs: outputs.append(body(token, past_key_values=cache)), model)
        if position >= num_prompt - 1:
            total += count(lambda outputs=outputs: model.lm_head(outputs[0].last_hidden_state), model)
    return total


def test_flops_of_an_account_are_those_that_run():
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


def test_only_the_experts_of_a_token_count():
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=6, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    attention, expert, router = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 48, 32 * 6
    assert product_flops(model, config) == (2 * 2 * (attention + 2 * expert + router), 2 * 50 * 32)
