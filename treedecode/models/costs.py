"""What a forward of a model costs, from its weights."""

from typing import Any

from torch import nn

# How configs name the experts a token goes through, and how many there are.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def product_flops(model: Any, config: Any) -> tuple[int, int]:
    """Floating-point operations of the products with weights: (per token, per row of logits); attention is not in them.

    A multiply-add is two. Of a layer of experts, those a token goes through count. Embeddings are looked up and norms
    and activations are elementwise: neither counts.
    """
    chosen, experts = _setting(config, _CHOSEN), _setting(config, _EXPERTS)
    per_token = 0.0
    embeddings = {id(m.weight) for m in model.get_decoder().modules() if isinstance(m, nn.Embedding)}
    for name, weight in model.get_decoder().named_parameters():
        if weight.dim() < 2 or id(weight) in embeddings:
            continue
        share = chosen / experts if chosen and experts and "experts" in name.split(".") else 1.0
        per_token += 2 * weight.numel() * share
    return round(per_token), 2 * model.get_output_embeddings().weight.numel()


def _setting(config: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value), None)
