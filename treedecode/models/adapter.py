"""ModelAdapter: the interface between a decoder and the model that it runs."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from treedecode.models.context import StepContext


@runtime_checkable
class ModelAdapter(Protocol):
    """A model as the decoder sees it: sizes, and a forward over the packed tokens of many branches.

    `TransformersModel` adapts models of Transformers. An adapter of your own inherits from this class and gets the
    defaults below; it has to set the sizes and to define `forward`.

    Attributes:
        num_layers, num_kv_heads, num_qo_heads, head_dim: sizes of attention and of the K/V cache.
        vocab_size: logits per token.
        max_position: the longest sequence the model was made for, in tokens.
        dtype, device: of the activations, and so of the K/V cache.
        eos_token_ids: tokens that end a sequence. Ids outside of the vocabulary never come.
        hidden_size: of the states that `forward_hidden` gives; 0 = it gives none.
        min_prefill: from this many query tokens on, attention of a branch is dense (`models.prefill.attend`) instead of
            paged; None = never.
        num_changes: changes of the model seen by `refresh`; K and V from before the last one are stale.
        flops_per_token, flops_per_logits: floating-point operations of the products with weights, for one token and for
            one row of logits; 0 = not known, and then left out of the accounts.
        module: the PyTorch module behind the adapter, whose weights identify the model; None = there is none.
        max_position_reason: why `max_position` is less than what the model was made for; "" = it is not.
    """

    num_layers: int
    num_kv_heads: int
    num_qo_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: tuple[int, ...]
    hidden_size: int = 0
    min_prefill: int | None = None
    num_changes: int = 0
    flops_per_token: int = 0
    flops_per_logits: int = 0
    module: nn.Module | None = None
    max_position_reason: str = ""

    def forward(self, input_ids: Tensor, position_ids: Tensor, context: StepContext, logit_rows: Tensor) -> Tensor:
        """Runs the packed query tokens of all branches; their K and V are in the cache afterwards.

        Args:
            input_ids, position_ids: `[num_tokens]` int64, branches in row order, each branch's tokens in order.
            context: pages, lengths and plan of this forward; `context.attend` computes attention of a layer.
            logit_rows: `[n]` int64, the packed tokens whose logits are wanted.

        Returns:
            logits `[n, vocab_size]`, of the model's dtype.
        """
        ...

    def forward_hidden(
        self, input_ids: Tensor, position_ids: Tensor, context: StepContext, logit_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs `forward` and also returns the states `[n, hidden_size]` that the logits were computed from.

        Raises:
            ValueError: the model gives no hidden states.
        """
        raise ValueError(f"model: {type(self).__name__} has no forward_hidden, so it gives no hidden states")

    def refresh(self, *, force: bool = False) -> int:
        """Follows changes of the model's weights, modules and hooks. The default takes the model for fixed.

        Args:
            force: follow changes even where none can be seen.

        Returns:
            `num_changes`.
        """
        return self.num_changes


def require_hidden_states(model: ModelAdapter) -> None:
    """Checks that a model gives hidden states.

    Raises:
        ValueError: it gives none.
    """
    if model.hidden_size == 0:
        raise ValueError(f"model: {type(model).__name__} has no forward_hidden, so it gives no hidden states")
