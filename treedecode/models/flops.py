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
    for name, module in model.get_decoder().named_modules():
        share = chosen / experts if chosen and experts and "experts" in name.split(".") else 1.0
        per_token += 2 * share * _num_weights(module)
    return round(per_token), 2 * _num_weights(model.get_output_embeddings())


def _num_weights(module: Any) -> int:
    """Weights of a module's own products; a quantised layer has them in a form of its own, but says its size."""
    if isinstance(module, nn.Embedding):
        return 0
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int) and not any(True for _ in module.children()):
        return sizes[0] * sizes[1]
    return sum(weight.numel() for weight in module.parameters(recurse=False) if weight.dim() >= 2)


def _setting(config: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value), None)
