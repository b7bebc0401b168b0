"""Floating-point operations of a model's forward, from its weights."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# Names in configs for the number of experts that a token goes through, and of all experts of a layer.
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
_ALL_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def product_flops(model: PreTrainedModel, config: PretrainedConfig) -> tuple[int, int]:
    """Counts the operations of products with weights, without attention, as (per token, per row of logits).

    A multiply-add is two. Of a layer of experts, those a token goes through count. Embeddings are looked up and norms
    and activations are elementwise: neither counts.
    """
    num_active, num_experts = _setting(config, _ACTIVE_EXPERTS), _setting(config, _ALL_EXPERTS)
    per_token = 0.0
    for name, module in model.get_decoder().named_modules():
        is_expert = "experts" in name.split(".")
        share = num_active / num_experts if num_active and num_experts and is_expert else 1.0
        per_token += 2 * share * _num_weights(module)
    return round(per_token), 2 * _num_weights(model.get_output_embeddings())


def _num_weights(module: Any) -> int:
    """Counts the weights of a module's own products.

    A quantised layer keeps its weights in a form of its own, so a layer that says its sizes is taken at its word.
    """
    if isinstance(module, nn.Embedding):
        return 0
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int) and not any(True for _ in module.children()):
        return sizes[0] * sizes[1]
    return sum(weight.numel() for weight in module.parameters(recurse=False) if weight.dim() >= 2)


def _setting(config: PretrainedConfig, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value), None)
