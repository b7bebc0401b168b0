"""Decoder: a model, its pages, and the calls that decode on them."""

import os
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch

from treedecode.accounting.meter import Meter
from treedecode.cache.memory import kv_memory_bytes, out_of_memory_named
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.common.validation import positive_int
from treedecode.decoding import beam_search
from treedecode.decoding.beams import BeamSearch, Hypothesis
from treedecode.decoding.codec import Codec, Prompt
from treedecode.decoding.completion import Completion
from treedecode.decoding.frontier import Frontier
from treedecode.decoding.generate import generate
from treedecode.decoding.recorder import Recorder
from treedecode.decoding.roots import open_roots
from treedecode.engine.engine import Engine
from treedecode.engine.futures import run_blocking
from treedecode.engine.graph_runner import GraphRunner
from treedecode.engine.sampling import Sampling, sampling_or
from treedecode.engine.scheduler import Scheduler
from treedecode.engine.stats import Stats
from treedecode.engine.stops import StopLike
from treedecode.models import ModelAdapter, as_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Decoder:
    """Decodes many branches of many prompts at once; what they share is computed, kept and read once.

    Args:
        model: a Transformers causal language model, or a `treedecode.models.ModelAdapter`.
        tokenizer: turns text into tokens and back; without one, prompts are token ids and completions have no text.
        kv_memory: bytes for keys and values, an int or a string like "2GiB". By default an eighth of the machine's
            memory (a GPU: 80% of what is free), and no more than `max_branches` branches of full length could use.
        page_size: tokens per page.
        max_branches: branches alive at once; `generate` queues what is beyond.
        prefill_tokens: prompt tokens computed per forward, beside the tokens being decoded.
        cuda_graphs: on a GPU, whether decode steps are captured in CUDA graphs and launched one step ahead. False for a
            model whose forward waits for the device, which capturing forbids.

    Raises:
        TypeError: the model is neither of Transformers nor an adapter.
        ValueError: the model is not supported, or an argument is out of range (named).
        MemoryError: there is not as much memory as `kv_memory` and `max_branches` take.
    """

    _pool_type: ClassVar[type[PagePool]] = PagePool
    _scheduler_type: ClassVar[type[Scheduler]] = Scheduler

    def __init__(
        self,
        model: "PreTrainedModel | ModelAdapter",
        tokenizer: Any = None,
        *,
        kv_memory: int | str | None = None,
        page_size: int = 16,
        max_branches: int = 512,
        prefill_tokens: int = 512,
        cuda_graphs: bool = True,
    ) -> None:
        positive_int("page_size", page_size)
        positive_int("max_branches", max_branches)
        positive_int("prefill_tokens", prefill_tokens)
        model = as_adapter(model)
        if model.dtype not in _DTYPES:
            raise ValueError(f"model: expected float32, bfloat16 or float16, got {model.dtype}")
        columns = -(-model.max_position // page_size)
        page_bytes = 2 * model.num_layers * model.num_kv_heads * page_size * model.head_dim * model.dtype.itemsize
        num_pages = kv_memory_bytes(kv_memory, model.device, page_bytes * columns * max_branches) // page_bytes
        if num_pages < 1:
            raise ValueError(f"kv_memory: {kv_memory} is less than one page of {page_bytes} bytes")
        self.model = model
        self.tokenizer = tokenizer
        with out_of_memory_named(kv_memory, max_branches):
            pool = self._pool_type(
                num_layers=model.num_layers,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                num_pages=num_pages,
                page_size=page_size,
                max_branches=max_branches,
                max_pages_per_branch=min(columns, num_pages),
                dtype=model.dtype,
                device=model.device,
            )
        self._codec = Codec(
            tokenizer,
            vocab_size=model.vocab_size,
            max_position=model.max_position,
            max_position_reason=model.max_position_reason,
            capacity=num_pages * page_size,
        )
        with out_of_memory_named(kv_memory, max_branches):
            self.engine = Engine(
                model,
                pool,
                self._codec.matcher,
                max_tokens=self._codec.max_tokens,
                prefill_tokens=prefill_tokens,
                graphs=GraphRunner(model, pool) if cuda_graphs and pool.device.type == "cuda" else None,
                scheduler_type=self._scheduler_type,
            )
        self.recorder = Recorder(self.engine)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        gguf_file: str | None = None,
        **options: Any,
    ) -> "Decoder":
        """Loads a model from the hub, a folder, or a GGUF file, and makes a decoder on it.

        Args:
            dtype: of weights and cache: float32, bfloat16 or float16, also by name; None takes the checkpoint's.
            options: arguments of `Decoder` (`kv_memory`, `page_size`, ...).
        """
        from treedecode.models import load_pretrained

        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        model, tokenizer = load_pretrained(path_or_id, dtype=dtype, device=device, gguf_file=gguf_file)
        return cls(model, tokenizer, **options)

    # -- text --

    def encode(self, text: str, *, special: bool = True, special_tokens: bool = True) -> list[int]:
        """Converts text to token ids, with the arguments of `Codec.encode`.

        Raises:
            ValueError: the decoder has no tokenizer.
        """
        return self._codec.encode(text, special=special, special_tokens=special_tokens)

    def decode(self, token_ids: Sequence[int] | IntArray) -> str:
        """Converts token ids to text without special tokens; empty without a tokenizer."""
        return self._codec.decode(token_ids)

    def prompt_ids(self, prompts: Prompt | Sequence[Prompt]) -> list[IntArray]:
        """Converts prompts to token ids, `[n]` int32 each.

        Raises:
            TypeError: they are not strings or lists of token ids.
            ValueError: one is empty, has an id outside of the vocabulary, or leaves no room for a new token (named).
        """
        return self._codec.prompt_ids(prompts)

    # -- decoding --

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        num_branches: int = 1,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = 256,
        stop: StopLike = None,
        callback: Callable[[int, int, str], None] | None = None,
    ) -> list[list[Completion]]:
        """Completes every prompt `num_branches` times.

        A prompt is computed once, whatever `num_branches` and however often it occurs; beginnings that prompts share
        are computed once too, also across calls. Given `sampling.seed`, the texts of a prompt depend on it and the seed
        alone; a prompt that occurs twice gets further samples, as if it had occurred once with more branches. Branches
        beyond those that are free wait until others end, of this call or of another, and go in portions.

        Args:
            prompts: strings or lists of token ids; one prompt alone is taken as a list of one.
            max_new_tokens: per branch; None goes on to what the model or the pages can hold.
            stop: strings or token ids that end a branch; the string of a special token stands for its id too.
            callback: called as `callback(branch, token_id, text)` for every new token, branch counting through
                `num_branches` of the first prompt, then of the second, and so on. `text` is what has become readable:
                it never ends inside a character or a stop string, and may be empty.

        Returns:
            `[len(prompts)][num_branches]` completions.

        Raises:
            TypeError: an argument has the wrong type (named); nothing has been started then.
            ValueError: an argument is out of range (named); nothing has been started then.
            OutOfBranches: frontiers hold every branch; those are not waited for, as they may be the caller's own.
            RuntimeError: the decoder is closed, or the call comes from a callback.
        """
        job = self.generate_async(
            prompts,
            num_branches=num_branches,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop=stop,
            callback=callback,
        )
        return self.run(job)

    async def generate_async(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        num_branches: int = 1,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = 256,
        stop: StopLike = None,
        callback: Callable[[int, int, str], None] | None = None,
    ) -> list[list[Completion]]:
        """Runs `generate` in a coroutine, in the same forwards as all else that runs on this decoder."""
        ids = self._codec.prompt_ids(prompts, fill=True)
        sampling, stops = sampling_or(sampling, Sampling()), self._codec.parse_stop(stop)
        positive_int("num_branches", num_branches)
        longest = np.array([max(map(len, ids))])
        return await generate(
            self.engine,
            ids,
            num_branches=num_branches,
            sampling=sampling,
            max_new_tokens=int(self._codec.new_token_limits(longest, max_new_tokens, fill=True)[0]),
            stops=stops,
            callback=callback,
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        num_beams: int = 4,
        num_return_sequences: int | None = None,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        repetition_penalty: float = 1.0,
        stop: StopLike = None,
        ignore_eos: bool = False,
    ) -> list[list[Completion]]:
        """Searches the most likely completions of every prompt with `num_beams` beams; returns them best first.

        Token for token what `generate(num_beams=...)` of Transformers finds; `treedecode.decoding.beams.BeamSearch`
        says what the settings mean. Finished beams are ranked by cum_logprob / len(token_ids) ** length_penalty.

        Args:
            num_return_sequences: completions per prompt, at most `num_beams`; None = all of them.
            repetition_penalty: multiplies the log-probs of tokens already in the branch, prompt included.
            stop: strings or token ids that end a beam.
            ignore_eos: the model's end-of-sequence tokens end nothing.

        Returns:
            `[len(prompts)][num_return_sequences]` completions.

        Raises:
            TypeError: an argument has the wrong type (named); nothing has been started then.
            ValueError: an argument is out of range (named); nothing has been started then.
            OutOfBranches: frontiers or other calls hold the branches.
        """
        work = self.beam_search_async(
            prompts,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            repetition_penalty=repetition_penalty,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        return self.run(work)

    async def beam_search_async(self, prompts: Prompt | Sequence[Prompt], **settings: Any) -> list[list[Completion]]:
        """Runs `beam_search` in a coroutine, in the same forwards as all else that runs on this decoder."""
        stops = self._codec.parse_stop(settings.pop("stop", None))
        return await beam_search.complete(self.engine, self._codec.prompt_ids(prompts, fill=True), stops, **settings)

    async def search_beams(
        self, prompts: Sequence[IntArray], settings: BeamSearch, **options: Any
    ) -> list[list[Hypothesis]]:
        """Runs a beam search with the settings of Transformers; `options` are those of `beam_search.search`."""
        return await beam_search.search(self.engine, prompts, settings, **options)

    async def roots(
        self, prompts: Prompt | Sequence[Prompt], *, sampling: Sampling | None = None, account: int = -1
    ) -> Frontier:
        """Opens one branch per prompt, computed up to its last token: the beginning of a search.

        Args:
            prompts: strings or lists of token ids.
            sampling: the default for this search; its seed, if it has one, is that of every tree.
            account: of `engine.meter`, to which all that grows from here is charged; -1 = none.

        Raises:
            TypeError: a prompt is neither a string nor token ids (named).
            ValueError: a prompt is empty or too long (named).
            OutOfBranches: there are more prompts than free branches.
        """
        ids, sampling = self.prompt_ids(prompts), sampling_or(sampling, Sampling())
        return await open_roots(self.engine, self._codec, self.recorder, ids, sampling, account)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end, from code that is no coroutine.

        Raises:
            RuntimeError: called from a callback, within a step; the decoder is closed.
        """
        if self.engine.jobs.in_callback:
            work.close()
            raise RuntimeError("called from a callback, which the decoder waits for; let the callback return first")
        return run_blocking(work)

    # -- state --

    @property
    def stats(self) -> Stats:
        """Counts of the forwards, tokens and preemptions of this decoder so far."""
        return self.engine.runner.stats

    @property
    def pool(self) -> PagePool:
        """The pages of all branches."""
        return self.engine.pool

    @property
    def meter(self) -> Meter:
        """The accounts that forwards are charged to."""
        return self.engine.meter

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens computed per forward, beside the tokens being decoded."""
        return self.engine.scheduler.prefill_tokens

    @property
    def uses_graphs(self) -> bool:
        """True if decode steps are captured in CUDA graphs."""
        return self.engine.runner.graphs is not None

    @property
    def max_tokens(self) -> int:
        """Tokens that a branch may have, prompt included, by the model's context and `kv_memory`."""
        return self._codec.max_tokens

    @property
    def num_branches(self) -> int:
        """Branches alive."""
        return self.pool.max_branches - self.engine.store.num_free_rows

    def collect(self) -> None:
        """Takes back the branches of frontiers that are garbage, which otherwise happens with the next call."""
        self.engine.store.collect()

    def paused(self, timeout: float) -> AbstractContextManager[bool]:
        """Keeps forwards from starting within a `with` block; False there if one took longer than `timeout` seconds."""
        return self.engine.store.locked(timeout)

    def forget(self) -> None:
        """Drops all keys and values, those of prompts seen before included; branches keep their tokens."""
        self.engine.runner.forget()

    def check_integrity(self) -> None:
        """Checks that pages, prefix index and branches agree.

        Raises:
            AssertionError: names what does not.
        """
        self.engine.check_integrity()

    def reset(self) -> None:
        """Drops all keys and values and follows the model as it is now; branches keep their tokens.

        Changed weights, modules and hooks are noticed without it. Call it after what cannot be noticed: a write through
        `.data`, or a switch that a forward reads, such as that of an adapter.
        """
        self.model.refresh(force=True)
        self.forget()

    def close(self) -> None:
        """Ends calls under way with a RuntimeError and gives all memory back; later calls raise."""
        self.engine.close()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
