"""Runs `model.generate(..., custom_generate=treedecode.generate)` of Transformers on a decoder."""

from typing import Any, cast

import numpy as np
import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from treedecode.decoding import beam_search
from treedecode.decoding.beams import BeamSearch, Hypothesis
from treedecode.decoding.decoder import Decoder
from treedecode.engine.sampling import Sampling
from treedecode.integrations.steps import Steps, assemble
from treedecode.integrations.withheld import takes_tokenizer, withheld
from treedecode.models.change_detector import ChangeDetector
from treedecode.models.supported import check_supported
from treedecode.models.transformers import TransformersModel, configs_of, exclusive

# What this module reads.
_HONOURED = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_length", "max_new_tokens",
    "min_length", "min_new_tokens", "eos_token_id", "pad_token_id", "num_beams", "num_return_sequences",
    "length_penalty", "early_stopping", "output_scores", "output_logits", "return_dict_in_generate",
    "max_time", "stop_strings",
}  # fmt: skip
# What changes how generate computes, but not what comes out, and says nothing to us.
_IRRELEVANT = {
    "bos_token_id", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size",
    "compile_config", "disable_compile", "decoder_start_token_id", "transformers_version",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size",
}  # fmt: skip
# Values that mean "off"; for what is not listed, None and False do.
_OFF: dict[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1, 1.0),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
}
# Processors that generate makes from the settings above, and the attribute that holds the setting.
_PROCESSORS: dict[type, tuple[str, str]] = {
    RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    MinLengthLogitsProcessor: ("min_length", "min_length"),
    MinNewTokensLengthLogitsProcessor: ("min_new_tokens", "min_new_tokens"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}
# Ignored by generate itself where it does not sample.
_SAMPLING_ONLY = {"typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
# The empty cache that generate makes, or the caller's own: Transformers has renamed it.
_CACHES = {"past_key_values", "cache"}
_MODEL_ARGUMENTS = {"attention_mask", "position_ids", "logits_to_keep", "use_cache"} | _CACHES
_SLOT = "_treedecode"
_MAX_BRANCHES = 1024  # what stopping criteria are asked about must be held at once


@takes_tokenizer
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    kv_memory: int | str | None = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    """Runs a `generate` of Transformers on treedecode: `model.generate(**inputs, custom_generate=treedecode.generate)`.

    Prompts are computed once, whatever `num_return_sequences` or `num_beams`, and all branches decode together over
    shared pages. Greedy and beam search give the tokens `generate` gives; sampling draws from the same distribution,
    its seed taken from torch's default generator (`torch.manual_seed`). The model is left as it was; a decoder is kept
    with it, so later calls start at once and find the beginnings of earlier prompts. It is made anew when the model
    changes: weights, modules, hooks, and switches such as those of adapters. A write into a part of a tensor through
    `.data` cannot be seen: `del model._treedecode` after one. Several threads may call this on one model, which must
    not run in other ways meanwhile. `torch.autocast` is refused.

    Honoured: do_sample, temperature, top_k, top_p, min_p, repetition_penalty, min and max length, min and max new
    tokens, eos_token_id, pad_token_id, num_return_sequences, num_beams, length_penalty, early_stopping, max_time,
    stopping_criteria, stop_strings with tokenizer, and streamer (asked and told about every new token, which is
    slower), return_dict_in_generate (`sequences`, of beam search also `beam_indices`), output_scores and output_logits
    (slower too; of beam search `sequences_scores` alone, without the per-step `scores`).

    Texts are those of `generate` for each prompt alone. In a batch `generate` differs in one thing: its
    repetition_penalty counts the padding as tokens of the prompt.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: as `generate` prepares
            them: `input_ids` is `[batch * max(num_beams, num_return_sequences), prompt_len]` int64, padded on the left
            where `attention_mask` is 0.
        kv_memory: bytes for keys and values (see `Decoder`); pass it to `model.generate`.
        tokenizer: of `stop_strings`, whose criterion `generate` has made of it.

    Returns:
        `[batch * num_return_sequences, length]` int64, prompts included, padded on the right; or a `ModelOutput`.

    Raises:
        ValueError: something is set that is not supported (named), or the model or a prompt is not.
    """
    check_supported(model)
    config = generation_config
    if withheld("assistant_model") is not None:
        raise ValueError("assistant_model: is not supported by treedecode.generate")
    _refuse_settings(config)
    _refuse_processors(config, logits_processor)
    criteria = _further_criteria(config, stopping_criteria)
    width = max(config.num_beams, config.num_return_sequences)
    prompts = _prompts(input_ids, model_kwargs, width)
    prompt_len = input_ids.shape[1]
    max_new_tokens = config.max_length - prompt_len
    eos = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
    min_new_tokens = max((config.min_length or 0) - prompt_len, config.min_new_tokens or 0, 0) if eos else 0
    decoder = _decoder_of(model, kv_memory)
    ends = [token for token in eos if 0 <= token < decoder.model.vocab_size]  # others mean padding, but never come
    longest = max(map(len, prompts))
    if longest + max_new_tokens - 1 > decoder.model.max_position:  # the last token is never computed
        reason = f" ({decoder.model.max_position_reason})" if decoder.model.max_position_reason else ""
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens is more than the model's "
            f"{decoder.model.max_position} positions{reason}"
        )
    if config.num_beams > 1:
        settings = BeamSearch(
            num_beams=config.num_beams,
            max_new_tokens=max_new_tokens,
            eos_token_ids=tuple(ends),
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            min_new_tokens=min_new_tokens,
        )
        penalty = config.repetition_penalty or 1.0
        stop = _beam_stop(criteria, input_ids[::width]) if criteria else None
        search = decoder.search_beams(prompts, settings, repetition_penalty=penalty, stop=stop)
        return _beam_output(decoder.run(search), input_ids, config, eos)
    sampling, stop_ids = _sampling(config, decoder, ends, min_new_tokens)
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    count = config.num_return_sequences
    steps = Steps(decoder, prompts, input_ids, max_new_tokens, criteria, eos, pad, withheld("streamer"))
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return decoder.run(steps.with_logits(logits_processor, config))
    if criteria or steps.streamer is not None:
        texts = decoder.run(steps.run(sampling, stop_ids))
    else:
        ids = [prompt.tolist() for prompt in prompts]
        options = {"num_branches": count, "sampling": sampling, "max_new_tokens": max_new_tokens, "stop": stop_ids}
        texts = [branch.token_ids for branches in decoder.generate(ids, **options) for branch in branches]
    sequences = assemble(input_ids, texts, pad)
    return (
        GenerateDecoderOnlyOutput(sequences=cast(LongTensor, sequences))
        if config.return_dict_in_generate
        else sequences
    )


def _sampling(
    config: GenerationConfig, decoder: Decoder, eos: list[int], min_new_tokens: int
) -> tuple[Sampling, list[int] | None]:
    """Returns the branches' settings, and end tokens that are not the decoder's own."""
    own = set(eos) == set(decoder.model.eos_token_ids)
    filters: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        filters = {
            "temperature": 1.0 if config.temperature is None else float(config.temperature),
            "top_k": config.top_k or 0,
            # 0 keeps one token, and so does the smallest positive number
            "top_p": 1.0 if config.top_p is None else max(float(config.top_p), 1e-9),
            "min_p": float(config.min_p or 0.0),
        }
    sampling = Sampling(
        **filters,
        repetition_penalty=float(config.repetition_penalty or 1.0),
        ignore_eos=not own,
        min_new_tokens=min_new_tokens,
    )
    return sampling, None if own or not eos else sorted(set(eos))


def _refuse_settings(config: GenerationConfig) -> None:
    ignored = _HONOURED | _IRRELEVANT | (set() if config.do_sample else _SAMPLING_ONLY)
    for name in vars(GenerationConfig()):  # a checkpoint's config may hold more, which means nothing to generate either
        value = getattr(config, name, None)
        if name.startswith("_") or name in ignored or value is None or value is False:
            continue
        if value not in _OFF.get(name, ()):
            raise ValueError(f"{name}: {value!r} is not supported by treedecode.generate; use generate without it")
    if config.do_sample and config.num_beams > 1:
        raise ValueError("do_sample: sampling with num_beams > 1 is not supported by treedecode.generate")
    if config.return_dict_in_generate and config.output_logits and config.num_beams > 1:
        raise ValueError("output_logits: not supported by treedecode.generate with num_beams > 1")


def _refuse_processors(config: GenerationConfig, logits_processor: LogitsProcessorList) -> None:
    """Lets through only what `generate` itself made from settings we honour."""
    for processor in logits_processor:
        attribute, setting = _PROCESSORS.get(type(processor), ("", ""))
        own = bool(setting) and getattr(processor, attribute) == getattr(config, setting)
        if not own or isinstance(getattr(processor, "prompt_ignore_length", None), int):
            raise ValueError(f"logits_processor: {type(processor).__name__} is not supported by treedecode.generate")


def _further_criteria(config: GenerationConfig, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
    """Returns the criteria beyond the length limit and the end tokens, which the decoder knows itself."""
    return StoppingCriteriaList(
        criterion
        for criterion in criteria
        if not (type(criterion) is MaxLengthCriteria and criterion.max_length == config.max_length)
        and not (type(criterion) is EosTokenCriteria and criterion.eos_token_id is config._eos_token_tensor)
    )


def _beam_stop(criteria: StoppingCriteriaList, prompts: Tensor) -> beam_search.Stop:
    def stop(prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        texts = torch.from_numpy(tokens.astype(np.int64)).to(prompts.device)
        ids = torch.cat([prompts[torch.from_numpy(prompt).to(prompts.device)], texts], dim=1)
        return criteria(cast(LongTensor, ids), None).numpy(force=True)

    return stop


def _prompts(input_ids: Tensor, model_kwargs: dict[str, Any], width: int) -> list[np.ndarray]:
    """Returns the token ids of each prompt without padding; `generate` has repeated every one `width` times."""
    for name, value in model_kwargs.items():
        is_empty = value is None or (isinstance(value, dict | list | tuple) and not value)
        if name not in _MODEL_ARGUMENTS and not is_empty:  # multimodal classes always bring an empty dict
            raise ValueError(f"{name}: is not supported by treedecode.generate")
        if name in _CACHES and value is not None and value.get_seq_length() > 0:
            raise ValueError(f"{name}: a filled cache is not supported; treedecode keeps prefixes by itself")
    ids = input_ids[::width].cpu()
    if ids.shape[1] == 0:
        raise ValueError("input_ids: expected at least one token per prompt (inputs_embeds are not supported)")
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask[::width].cpu()
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected shape {list(ids.shape)}, got {list(mask.shape)}")
    mask = mask != 0
    if (mask[:, :-1] & ~mask[:, 1:]).any() or not mask[:, -1].all():
        raise ValueError("attention_mask: expected padding on the left only (padding_side='left'), and no empty prompt")
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        expected = (mask.cumsum(1) - 1)[mask]
        planes = positions if positions.dim() == 3 else positions[None]  # some classes have several, equal for text
        if any(plane.dim() != 2 or not torch.equal(plane[::width].cpu()[mask], expected) for plane in planes):
            raise ValueError("position_ids: expected those of the attention mask; others are not supported")
    return [row[keep].numpy().astype(np.int32) for row, keep in zip(ids, mask, strict=True)]


def _beam_output(
    results: list[list[Hypothesis]], input_ids: Tensor, config: GenerationConfig, eos: list[int]
) -> Tensor | GenerateBeamDecoderOnlyOutput:
    count, width = config.num_return_sequences, config.num_beams
    # A vocabulary may have fewer texts than there are beams: `generate` returns empty ones of this score for the rest.
    missing = [Hypothesis(np.empty(0, np.int64), -1e9, np.empty(0, np.int64), np.empty(0))] * count
    best = [hypothesis for hypotheses in results for hypothesis in (hypotheses + missing)[:count]]
    pad = config._pad_token_tensor
    # Transformers fills with the first end token where the padding token's id is 0.
    fill = -1 if not eos else int(pad) if pad is not None and int(pad) else eos[0]
    prompts = input_ids[::width].repeat_interleave(count, dim=0)
    sequences = assemble(prompts, [hypothesis.token_ids.tolist() for hypothesis in best], fill)
    if not config.return_dict_in_generate:
        return sequences
    indices = torch.full((len(best), sequences.shape[1] - input_ids.shape[1]), -1, dtype=torch.int32, device="cpu")
    for i, hypothesis in enumerate(best):
        indices[i, : len(hypothesis.beams)] = torch.from_numpy(hypothesis.beams) + i // count * width
    scores = torch.tensor([hypothesis.score for hypothesis in best], device=input_ids.device)
    return GenerateBeamDecoderOnlyOutput(
        sequences=cast(LongTensor, sequences),
        sequences_scores=scores if config.output_scores else None,
        beam_indices=cast(LongTensor, indices.to(input_ids.device)),
    )


class _Slot:
    """Keeps a decoder on the model it decodes, so that it lives exactly as long; not copied or saved with the model."""

    def __init__(self, decoder: Decoder, key: tuple[Any, ...], detector: ChangeDetector) -> None:
        self.decoder = decoder
        self.key = key
        self.detector = detector

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _decoder_of(model: PreTrainedModel, kv_memory: int | str | None) -> Decoder:
    """Returns the model's decoder, made anew when the model, its dtype or device, or `kv_memory` has changed."""
    with exclusive(configs_of(model)):  # two threads must not make one each
        key = (kv_memory, model.device, model.dtype)
        slot: _Slot | None = model.__dict__.get(_SLOT)
        if slot is not None and slot.key == key and not slot.detector.has_changed():
            return slot.decoder
        model.__dict__.pop(_SLOT, None)  # not closed: another thread may still decode on it
        del slot
        adapter = TransformersModel(model, keep_alive=False)  # the model holds the decoder, and not the other way round
        decoder = Decoder(adapter, kv_memory=kv_memory, max_branches=_MAX_BRANCHES)
        model.__dict__[_SLOT] = _Slot(decoder, key, ChangeDetector(model, samples=True))
        return decoder
