"""Tells which models of Transformers can be decoded as a tree, and why others cannot."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

# Layer types whose attention is what tree_attention computes. Anything else keeps state outside of K and V pages
# (linear attention, state spaces) or masks differently (chunked attention).
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_supported(model: PreTrainedModel) -> Any:
    """Checks that a model can be decoded as a tree, and returns its text config.

    Raises:
        TypeError: it is no model of Transformers.
        ValueError: it cannot be decoded as a tree (the message says why).
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    if model.device.type == "meta":
        raise ValueError(f"model: the weights of {name} are on the meta device; load them first")
    if model.config.is_encoder_decoder:
        raise ValueError(f"model: {name} is an encoder-decoder; only decoder-only models are supported")
    if not model._supports_attention_backend:
        raise ValueError(
            f"model: {name} does not support attention backends (_supports_attention_backend is not set), so its "
            "attention cannot be replaced by tree attention"
        )
    if model.get_output_embeddings() is None:
        raise ValueError(f"model: {name} has no language model head; load it with AutoModelForCausalLM")
    config = model.config.get_text_config(decoder=True)
    unsupported = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if unsupported:
        supported = ", ".join(sorted(_LAYER_TYPES))
        raise ValueError(f"model: {name} has layers of type {', '.join(unsupported)}; supported are {supported}")
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False:
        raise ValueError(f"model: {name} attends in both directions; only causal models are supported")
    if any(getattr(m, "attn_temperature_tuning", False) and not getattr(m, "use_rope", True) for m in model.modules()):
        raise ValueError(
            f"model: {name} scales queries by their place in the forward (attn_temperature_tuning), which is not "
            "supported: a forward has the tokens of many branches"
        )
    if model.training:
        raise ValueError(f"model: {name} is in training mode, where dropout is random; call model.eval()")
    refuse_autocast(model.device)
    return config


class PositionLimit(NamedTuple):
    """The number of tokens that a sequence may have, and the reason."""

    max_position: int
    reason: str


def fixed_rotation_limit(model: nn.Module) -> PositionLimit | None:
    """Returns up to which length a model rotates a token by angles of its position alone; None: at all lengths.

    Beyond it Transformers takes the angles from the longest sequence of a forward, so a text would depend on those
    beside it, and keys in the cache would have angles of another length.
    """
    limits = []
    for module in model.modules():
        rope_types = getattr(module, "rope_type", None)
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        for layer, rope_type in (rope_types if isinstance(rope_types, dict) else {None: rope_types}).items():
            if rope_type == "longrope":
                settings = parameters if layer is None else parameters[layer]
                limits.append((settings["original_max_position_embeddings"], rope_type))
            elif isinstance(rope_type, str) and "dynamic" in rope_type:
                limits.append((module.original_max_seq_len, rope_type))
    if not limits:
        return None
    length, rope_type = min(limits)
    reason = f"beyond {length} tokens its {rope_type} rotations depend on the longest sequence, which is not supported"
    return PositionLimit(int(length), reason)


def refuse_autocast(device: torch.device) -> None:
    """Refuses to run inside of `torch.autocast`: keys and values would have its dtype, and stay for later calls.

    Raises:
        ValueError: it is on.
    """
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "torch.autocast: is not supported; load the model with dtype=torch.bfloat16, or call treedecode outside of "
            "it or under torch.autocast(..., enabled=False)"
        )
