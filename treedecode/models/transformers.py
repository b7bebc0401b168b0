"""TransformersModel: runs unmodified decoder-only models of Transformers over the paged tree cache.

One forward takes the query tokens of all branches, packed as a batch of one `[1, num_tokens]`. The model's own code
does everything but attention, which arrives here through `transformers.AttentionInterface`: new keys and values go to
their cache slots, and `ops.tree_attention` reads every shared page once. Between two forwards the model is as it was.
On the CPU all layers of a common decoder are one op instead (`FusedDecoder`), with the same bits.

Adapters of one model take turns, so several threads may decode on it. The model's own forward must not run meanwhile.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from treedecode.models import prefill
from treedecode.models.adapter import ModelAdapter
from treedecode.models.attention_probe import AttentionProbe, probe_positions
from treedecode.models.change_detector import ChangeDetector
from treedecode.models.context import StepContext
from treedecode.models.fast_forward import FastForward
from treedecode.models.fast_modules import UnsupportedModule
from treedecode.models.flops import product_flops
from treedecode.models.fused_decoder import FusedDecoder, PreparedForward
from treedecode.models.supported import check_supported, fixed_rotation_limit, refuse_autocast

__all__ = ["StepContext", "TransformersModel"]

ATTENTION = "treedecode"
_MIN_PREFILL = 256  # query tokens, two work tiles of a group of one

_locks: dict[int, threading.RLock] = {}  # by the id of a config
_locks_lock = threading.Lock()


@contextmanager
def exclusive(configs: list[Any]) -> Iterator[None]:
    """Lets one thread at a time run or inspect the models that have one of `configs` (see `configs_of`)."""
    with ExitStack() as locks:
        for config in sorted(configs, key=id):  # in an order that all threads keep to
            with _locks_lock:
                if id(config) not in _locks:
                    _locks[id(config)] = threading.RLock()
                    weakref.finalize(config, _locks.pop, id(config))
                lock = _locks[id(config)]
            locks.enter_context(lock)
        yield


Context = StepContext | AttentionProbe


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    treedecode_context: Context | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Implements `attn_implementation="treedecode"`; `query` is `[1, num_qo_heads, num_tokens, head_dim]`."""
    if treedecode_context is None:
        raise ValueError(
            "attn_implementation 'treedecode' works inside treedecode.models.TransformersModel.forward only: this call "
            f"of {type(module).__name__} brought no page context"
        )
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} asks for an attention mask; tree attention is causal and takes none")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):  # as Transformers' own functions
        raise ValueError(f"{type(module).__name__} attends in both directions; only causal models are supported")
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a position bias to the scores; tree attention has none")
    out = treedecode_context.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.float(),
    )
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attention_function)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Lets compiled forwards of a model's modules run as they were written.

    They would be compiled again for this attention and every number of tokens, which takes minutes.
    """
    if not any(_is_compiled(module) for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _is_compiled(module: nn.Module) -> bool:
    own_forward = module.__dict__.get("forward")
    return module._compiled_call_impl is not None or hasattr(own_forward, "_torchdynamo_orig_callable")


class TransformersModel(ModelAdapter):
    """Adapts a Transformers causal language model to the decoder.

    Attributes:
        model: the user's model, which is unchanged between two forwards.
        num_layers, num_kv_heads, num_qo_heads, head_dim, vocab_size: sizes of the K/V cache and of the logits.
        max_position: the longest sequence the model was made for, in tokens, or that is supported (see
            `max_position_reason`).
        dtype, device: of the activations, and so of the K/V cache.
        eos_token_ids: tokens that end a sequence, from the generation config.
        min_prefill: from how many query tokens on a branch's attention is dense (`prefill.attend`); None = never, as on
            the CPU, where a token's bits must not depend on how many come with it.
        num_changes: changes of the model that were seen; K and V from before the last one are stale.
        flops_per_token, flops_per_logits: of the products with weights, as `product_flops` counts them.
        hidden_size: of the states that the language model head reads.
    """

    def __init__(self, model: PreTrainedModel, *, optimize: bool = True, keep_alive: bool = True) -> None:
        """Checks that `model` can be decoded as a tree, and prepares a faster forward if asked to.

        Args:
            optimize: on the CPU, replace modules by faster ones that give the same results while a forward runs.
            keep_alive: False: the adapter does not keep the model alive, because the model holds the adapter.

        Raises:
            TypeError: not a Transformers model.
            ValueError: the model has no attention backends, is an encoder-decoder, keeps state that is not K and V,
                is in training mode, or does anything else that the message names.
        """
        config = self._config = check_supported(model)
        self._model = (lambda: model) if keep_alive else weakref.ref(model)
        self._configs = configs_of(model)
        self._optimize = optimize
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.max_position: int = config.max_position_embeddings
        self.max_position_reason = ""
        fixed = fixed_rotation_limit(model)
        if fixed is not None and fixed.max_position < self.max_position:
            self.max_position, self.max_position_reason = fixed
        self._fast: FastForward | None = None
        self._fused: FusedDecoder | None = None
        with exclusive(self._configs):
            probe = self._probe_attention()
            self._check_layers(config, probe)
            self._build_forwards()
        may_prefill_dense = self.device.type == "cuda" and self._supports_dense_prefill(probe)
        self.min_prefill = _MIN_PREFILL if may_prefill_dense else None
        self.num_changes = 0
        self.flops_per_token, self.flops_per_logits = product_flops(model, config)
        # Others, like the -1 of some checkpoints, are never generated.
        self.eos_token_ids: tuple[int, ...] = tuple(i for i in _eos_token_ids(model) if 0 <= i < self.vocab_size)

    @property
    def model(self) -> PreTrainedModel:
        """The user's model.

        Raises:
            ReferenceError: it was deleted.
        """
        model = self._model()
        if model is None:
            raise ReferenceError("model: was deleted")
        return model

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """The user's model."""
        return self.model

    @property
    def optimizations(self) -> list[str]:
        """Lines that say which modules run a faster forward, which do not, and why; empty with `optimize=False`."""
        return self._fast.report if self._fast is not None else []

    def refresh(self, *, force: bool = False) -> int:
        """Follows changes of the model: its weights, modules and hooks.

        Args:
            force: follow changes even where none can be seen, such as writes through `.data`.

        Returns:
            `num_changes`.

        Raises:
            ValueError: the model was put into training mode.
        """
        if self.model.training:
            raise ValueError("model: in training mode, where dropout is random; call model.eval()")
        refuse_autocast(self.device)
        with exclusive(self._configs):
            if force or self._change_detector.has_changed():
                self._build_forwards()
                self.num_changes += 1
            return self.num_changes

    def _build_forwards(self) -> None:
        self._fast = self._fused = None
        if self._optimize:
            with torch.device(self.device):  # for `torch.set_default_device` may say another
                self._fast = FastForward(self.model, lambda: dict(self._probe_attention().calls))
                self._fused = self._build_fused(self._fast)
        self._change_detector = ChangeDetector(self.model)

    def _build_fused(self, fast: FastForward) -> FusedDecoder | None:
        if self.device.type != "cpu":
            return None
        try:
            fused = FusedDecoder(self.model, fast)
            with torch.inference_mode():
                fused.require_same(self._run_hidden, self)
        except UnsupportedModule as reason:
            fast.report.append(f"layer by layer ({reason})")
            return None
        fast.report.append("all layers and the head in one op")
        return fused

    def _probe_attention(self) -> AttentionProbe:
        """Runs the model on a few tokens with a stand-in attention, which also tells the sizes of its outputs."""
        probe, count = AttentionProbe(), 5
        ids = torch.arange(1, count + 1, device=self.device) % self._config.vocab_size
        positions = probe_positions(count, self.max_position, self.device)
        logits, hidden = self._run_hidden(ids, positions, probe, ids[:1])
        self.vocab_size: int = logits.shape[-1]
        self.hidden_size: int = hidden.shape[-1]
        return probe

    def _check_layers(self, config: PretrainedConfig, probe: AttentionProbe) -> None:
        name = type(self.model).__name__
        layers = [index for index, _ in probe.calls]
        if layers != list(range(config.num_hidden_layers)):
            raise ValueError(
                f"model: {name} has {config.num_hidden_layers} layers, but attention was called for layers {layers}: "
                "layers without keys and values, or that share those of others, are not supported"
            )
        if len(probe.shapes) > 1:
            raise ValueError(f"model: {name} has layers that differ in head number or size, which is not supported")
        ((self.num_qo_heads, self.num_kv_heads, self.head_dim, k_dim, v_dim),) = probe.shapes
        if not self.head_dim == k_dim == v_dim:
            raise ValueError(
                f"model: {name} has head sizes {self.head_dim} (query), {k_dim} (key) and {v_dim} (value); "
                "tree attention needs one size"
            )
        self.num_layers: int = len(layers)

    def _supports_dense_prefill(self, probe: AttentionProbe) -> bool:
        return all(
            prefill.supports(
                head_dim=self.head_dim,
                dtype=self.dtype,
                softcap=bool(args["softcap"]),
                sinks=args["sinks"] is not None,
            )
            for _, args in probe.calls
        )

    @contextmanager
    def _tree_attention(self) -> Iterator[None]:
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = ATTENTION
            yield
        finally:
            # Setting a config sets those below it too: parents come first in the list, so children end up right.
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation = implementation

    def _run(self, input_ids: Tensor, position_ids: Tensor, context: Context, logit_rows: Tensor) -> Tensor:
        fast = self._fast.active() if self._fast is not None else nullcontext()
        # Quantised heads of torchao take no empty input.
        wanted = logit_rows.new_zeros(1) if len(logit_rows) == 0 < len(input_ids) else logit_rows
        with torch.inference_mode(), self._tree_attention(), fast, uncompiled(self.model):
            out = self.model(
                input_ids=input_ids.unsqueeze(0),
                position_ids=position_ids.unsqueeze(0),
                use_cache=False,
                logits_to_keep=wanted,
                treedecode_context=context,
            )
        return out.logits[0, : len(logit_rows)]

    def _run_hidden(
        self, input_ids: Tensor, position_ids: Tensor, context: Context, logit_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs `_run`, and also returns the input of the language model head."""
        hidden: list[Tensor] = []
        handle = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        try:
            logits = self._run(input_ids, position_ids, context, logit_rows)
        finally:
            handle.remove()
        return logits, hidden[0][0, : len(logit_rows)]

    def forward(self, input_ids: Tensor, position_ids: Tensor, context: StepContext, logit_rows: Tensor) -> Tensor:
        """Runs the packed query tokens of all branches; their K and V are in the cache afterwards.

        Args:
            input_ids, position_ids: `[num_tokens]` int64, branches in row order, each branch's tokens in order.
            context: pages, lengths and plan of this forward.
            logit_rows: `[n]` int64, the packed tokens whose logits are wanted.

        Returns:
            logits `[n, vocab_size]`, of the model's dtype.

        Raises:
            ValueError: the model was put into training mode, or an argument does not fit (named).
        """
        prepared = self.prepare_forward(input_ids, position_ids, context, logit_rows)
        if prepared is not None:
            return prepared()[0]
        with exclusive(self._configs):
            return self._run(input_ids, position_ids, context, logit_rows)

    def forward_hidden(
        self, input_ids: Tensor, position_ids: Tensor, context: StepContext, logit_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs `forward`, and also returns the states `[n, hidden_size]` that the logits were computed from."""
        prepared = self.prepare_forward(input_ids, position_ids, context, logit_rows)
        if prepared is not None:
            return prepared()
        with exclusive(self._configs):
            return self._run_hidden(input_ids, position_ids, context, logit_rows)

    def prepare_forward(
        self, input_ids: Tensor, position_ids: Tensor, context: StepContext, logit_rows: Tensor
    ) -> PreparedForward | None:
        """Prepares a forward that computes `(logits, hidden)` without the model, and so may run on any thread.

        Returns:
            the forward, with the weights as they are now; None: this model, or this context, goes layer by layer.
        """
        with exclusive(self._configs):
            self.refresh()
            if self._fused is None or not isinstance(context, StepContext) or context.kv is None or context.prefills:
                return None
            with torch.inference_mode():
                return self._fused.prepare_forward(input_ids, position_ids, context, logit_rows)


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Returns the configs from which the model's modules read their attention implementation, parents first."""
    configs: dict[int, Any] = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs.setdefault(id(config), config)
    return list(configs.values())


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = model.config.get_text_config(decoder=True).eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
