"""Decoder: a model, its pages, and everything that decodes on them."""

import asyncio
import contextlib
import contextvars
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numpy as np
import torch

from treedecode.accounting.meter import Meter
from treedecode.cache.memory import kv_memory_bytes, out_of_memory_named
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.decoding import beam_search
from treedecode.decoding import generate as completions
from treedecode.decoding.arguments import sampling_or, token_ids, whole_numbers
from treedecode.decoding.frontier import Frontier
from treedecode.decoding.generate import Completion
from treedecode.decoding.recorder import Recorder
from treedecode.decoding.roots import roots
from treedecode.engine.engine import OUTER_LOOPS, Engine
from treedecode.engine.graph_steps import CapturedSteps
from treedecode.engine.jobs import Stats
from treedecode.engine.sampling import Sampling
from treedecode.engine.stops import StopLike, StopMatcher, StopSet, parse_stop

Prompt = str | Sequence[int] | np.ndarray
T = TypeVar("T")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Decoder:
    """Decodes many branches of many prompts at once; what they share is computed, kept and read once.

    Args:
        model: a Transformers causal language model, or an adapter with the interface of `TransformersModel`.
        tokenizer: turns text into tokens and back; without one, prompts are token ids and completions have no text.
        kv_memory: bytes for keys and values, an int or a string like "2GiB". By default an eighth of the machine's
            memory (a GPU: 80% of what is free), and no more than `max_branches` branches of full length could use.
        page_size: tokens per page.
        max_branches: branches alive at once; `generate` queues what is beyond.
        prefill_tokens: prompt tokens computed per forward, beside the tokens being decoded.
        cuda_graphs: on a GPU, whether decode steps are captured in CUDA graphs and launched one step ahead. False for a
            model whose forward waits for the device, which capturing forbids.

    Raises:
        TypeError, ValueError: the model is not supported, or an argument is out of range (named).
        MemoryError: there is not as much memory as `kv_memory` and `max_branches` take.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        kv_memory: int | str | None = None,
        page_size: int = 16,
        max_branches: int = 512,
        prefill_tokens: int = 512,
        cuda_graphs: bool = True,
    ) -> None:
        for name, value in (
            ("page_size", page_size),
            ("max_branches", max_branches),
            ("prefill_tokens", prefill_tokens),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if not hasattr(model, "num_kv_heads"):
            from treedecode.models import TransformersModel

            model = TransformersModel(model)
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
            pool = PagePool(
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
        # The last token of a full branch is never computed, so a prompt may fill the pages and one token more come out.
        self._capacity = num_pages * page_size
        self._max_tokens = min(model.max_position, self._capacity)
        matcher = StopMatcher(tokenizer, model.vocab_size)
        captured = CapturedSteps(model, pool) if cuda_graphs and pool.device.type == "cuda" else None
        with out_of_memory_named(kv_memory, max_branches):
            self.engine = Engine(
                model, pool, matcher, max_tokens=self._max_tokens, prefill_tokens=prefill_tokens, captured=captured
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
        """A decoder on a model from the hub, a folder, or a GGUF file.

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

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special`: with the tokens a text begins with, unless it spells them out itself.

        Raises:
            ValueError: the decoder has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this decoder has no tokenizer; give token ids instead of text")
        bos = getattr(self.tokenizer, "bos_token", None)
        return list(self.tokenizer.encode(text, add_special_tokens=special and not (bos and text.startswith(bos))))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens; empty without a tokenizer."""
        return self.engine.matcher.decode(np.asarray(token_ids))

    def prompt_ids(self, prompts: Prompt | Sequence[Prompt]) -> list[IntArray]:
        """Token ids `[n]` of every prompt.

        Raises:
            TypeError: not strings or lists of token ids. ValueError: one is empty, has an id outside the vocabulary, or
                leaves no room for a new token (named).
        """
        if isinstance(prompts, str):
            return [self._prompt(prompts, "prompts")]
        if isinstance(prompts, (bytes, dict)) or not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
            raise TypeError(f"prompts: expected strings or lists of token ids, got {type(prompts).__name__}")
        if len(prompts) == 0:
            raise ValueError("prompts: is empty; expected at least one prompt with at least one token")
        if isinstance(prompts[0], int) or getattr(prompts[0], "ndim", None) == 0:
            return [self._prompt(cast(Prompt, prompts), "prompts")]
        return [self._prompt(cast(Prompt, prompt), f"prompts[{i}]") for i, prompt in enumerate(prompts)]

    def _prompt(self, prompt: Prompt, name: str) -> IntArray:
        tokens = token_ids(self.encode(prompt) if isinstance(prompt, str) else prompt, name, self.model.vocab_size)
        if len(tokens) == 0:
            raise ValueError(f"{name}: is empty")
        if len(tokens) >= self.model.max_position:
            raise ValueError(
                f"{name}: {len(tokens)} tokens leave no room for a new one in the model's {self.model.max_position}"
            )
        if len(tokens) >= self._capacity:
            raise ValueError(
                f"{name}: {len(tokens)} tokens and a new one do not fit the {self._capacity} tokens of kv_memory"
            )
        return tokens.astype(np.int32)

    def parse_stop(self, stop: StopLike) -> StopSet:
        """What a `stop` argument means; raises TypeError or ValueError for what is none."""
        has_tokenizer, special = self.tokenizer is not None, self.engine.matcher.special
        return parse_stop(stop, vocab_size=self.model.vocab_size, has_tokenizer=has_tokenizer, special=special)

    def check_length(self, num_tokens: int, max_new_tokens: int | None) -> int:
        """The limit an extend of a branch runs to; without one given, what the model and the pages hold."""
        return int(self.check_lengths(np.array([num_tokens]), max_new_tokens)[0])

    def check_lengths(self, num_tokens: IntArray, max_new_tokens: int | Sequence[int] | IntArray | None) -> IntArray:
        """The same for branches of `[n]` tokens, with one limit for all or one for each."""
        if max_new_tokens is None:
            return np.full(len(num_tokens), self._max_tokens)
        limits = whole_numbers(max_new_tokens, len(num_tokens), "max_new_tokens")
        if (limits < 1).any():
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        too_long = np.flatnonzero(np.minimum(num_tokens + limits, self.model.max_position) > self._capacity)
        if len(too_long):
            raise ValueError(
                f"max_new_tokens: {num_tokens[too_long[0]]} tokens and {limits[too_long[0]]} new ones do not fit the "
                f"{self._capacity} tokens of kv_memory"
            )
        return limits

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
            TypeError, ValueError: an argument is wrong (named); nothing has been started then.
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
        """`generate` for coroutines: decodes together with whatever else runs on this decoder."""
        return await completions.generate(
            self,
            self.prompt_ids(prompts),
            num_branches=num_branches,
            sampling=sampling_or(sampling, Sampling()),
            max_new_tokens=max_new_tokens,
            stops=self.parse_stop(stop),
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
        """The most likely completions of every prompt that a search with `num_beams` beams finds, best first.

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
            TypeError, ValueError: an argument is wrong (named); nothing has been started then.
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
        """`beam_search` for coroutines: decodes together with whatever else runs on this decoder."""
        stops = self.parse_stop(settings.pop("stop", None))
        return await beam_search.complete(self.engine, self.prompt_ids(prompts), stops, **settings)

    async def roots(
        self, prompts: Prompt | Sequence[Prompt], *, sampling: Sampling | None = None, account: int = -1
    ) -> Frontier:
        """One branch per prompt, computed up to its last token: where a search begins.

        Args:
            prompts: strings or lists of token ids.
            sampling: the default for this search; its seed, if it has one, is that of every tree.
            account: of `engine.meter`, to which all that grows from here is charged; -1 = none.

        Raises:
            TypeError, ValueError: a prompt is wrong (named). OutOfBranches: more prompts than free branches.
        """
        return await roots(self, self.prompt_ids(prompts), sampling_or(sampling, Sampling()), account)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end from code that is not one; inside a running event loop (Jupyter) in a thread.

        Raises:
            RuntimeError: called from a callback, within a step; the decoder is closed.
        """
        if self.engine.in_callback:
            work.close()
            raise RuntimeError("called from a callback, which the decoder waits for; let the callback return first")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(work)
        context = contextvars.copy_context()
        context.run(OUTER_LOOPS.set, (*OUTER_LOOPS.get(), loop))
        # a thread of its own: this may be the thread of an outer run, whose coroutine calls what is not one
        worker = ThreadPoolExecutor(1, thread_name_prefix="treedecode")
        try:
            return worker.submit(context.run, asyncio.run, work).result()
        finally:
            worker.shutdown(wait=False)

    # -- state --

    @property
    def stats(self) -> Stats:
        """What this decoder has computed, reused and preempted so far."""
        return self.engine.stats

    @property
    def pool(self) -> PagePool:
        """The pages of all branches."""
        return self.engine.pool

    @property
    def meter(self) -> Meter:
        """The accounts that forwards are charged to."""
        return self.engine.meter

    @property
    def max_tokens(self) -> int:
        """Tokens that a branch may have, prompt included, by the model's context and `kv_memory`."""
        return self.engine.table.max_tokens

    @property
    def num_branches(self) -> int:
        """Branches alive."""
        return self.pool.max_branches - self.engine.num_free_rows

    def collect(self) -> None:
        """Takes back the branches of frontiers that are garbage, which otherwise happens with the next call."""
        self.engine.collect()

    @contextlib.contextmanager
    def paused(self, timeout: float) -> Iterator[bool]:
        """Keeps forwards from starting within the block; yields False if one took longer than `timeout` seconds."""
        is_paused = self.engine.lock.acquire(timeout=timeout)
        try:
            yield is_paused
        finally:
            if is_paused:
                self.engine.lock.release()

    def forget(self) -> None:
        """Drops all keys and values, those of prompts seen before included; branches keep their tokens."""
        self.engine.forget()

    def check_integrity(self) -> None:
        """Checks that pages, prefix index and branches agree.

        Raises:
            AssertionError: names what does not.
        """
        self.engine.check_integrity()

    def reset(self) -> None:
        """Computes everything anew from here on, with the model as it is now; branches keep their tokens.

        Changed weights, modules and hooks are noticed without it. Call it after what cannot be noticed: a write through
        `.data`, or a switch that a forward reads, such as that of an adapter.
        """
        if hasattr(self.model, "refresh"):
            self.model.refresh(force=True)
        self.forget()

    def close(self) -> None:
        """Ends what is decoding with a RuntimeError and gives all memory back; later calls raise."""
        self.engine.close()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
