"""Steps: a `generate` of Transformers that looks at every new token, for criteria, streamers, scores and logits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from treedecode.decoding.decoder import Decoder
from treedecode.decoding.frontier import Frontier
from treedecode.engine.sampling import Sampling


@dataclass(frozen=True)
class Steps:
    """Generates a token at a time on all rows of a `generate` call.

    Args:
        prompts: token ids of each prompt, without padding; input_ids: `[n, prompt_len]` as `generate` prepares them,
            each prompt as often as it has branches.
        criteria: asked about all of `input_ids` with the new tokens after each step.
        eos: tokens that end a row; pad: what follows them.
        streamer: is given the tokens of each step; None = there is none.
    """

    decoder: Decoder
    prompts: list[np.ndarray]
    input_ids: Tensor
    max_new_tokens: int
    criteria: StoppingCriteriaList
    eos: list[int]
    pad: int
    streamer: Any = None

    async def run(self, sampling: Sampling, ends: list[int] | None) -> list[list[int]]:
        """Samples by the decoder's own op.

        Returns:
            the new tokens of each row.
        """
        texts: list[list[int]] = []
        done = np.zeros(len(self.input_ids), bool)
        with await self._branches(sampling) as branches:
            for step in range(self.max_new_tokens):
                settings = replace(sampling, seed=None, min_new_tokens=max(0, sampling.min_new_tokens - step))
                # Without end tokens `generate` has nothing to fill ended texts with: they go on until all have ended.
                with branches.select(~done if self.eos else np.ones_like(done)) as live:
                    await live.extend(stop=ends, max_new_tokens=1, sampling=settings, fill=True)
                texts = branches.token_ids()
                ids = assemble(self.input_ids, texts, self.pad)
                done |= self._ended(ids, None)
                if done.all():
                    break
        self._end_stream()
        return texts

    async def with_logits(self, processors: LogitsProcessorList, config: GenerationConfig) -> GenerateDecoderOnlyOutput:
        """Chooses tokens as Transformers does, from logits that its own processors have changed."""
        ids, done = self.input_ids, np.zeros(len(self.input_ids), bool)
        scores: tuple[Tensor, ...] | None = () if config.output_scores else None
        raw: tuple[Tensor, ...] | None = () if config.output_logits else None
        # The seed is not used. Without one a branch draws it from the generator that tokens are drawn from below.
        with await self._branches(Sampling(seed=0)) as branches:
            for step in range(self.max_new_tokens):
                logits = (await branches.logits()).to(ids.device, torch.float32)
                processed = self._processed(processors, ids, logits.clone())
                scores = None if scores is None else (*scores, processed)
                raw = None if raw is None else (*raw, logits)
                if config.do_sample:
                    tokens = torch.multinomial(processed.softmax(dim=-1), num_samples=1).squeeze(1)
                else:
                    tokens = processed.argmax(dim=-1)
                if self.eos:
                    tokens = torch.where(torch.from_numpy(done).to(tokens.device), self.pad, tokens)
                ids = torch.cat([ids, tokens[:, None]], dim=-1)
                done |= self._ended(ids, scores)
                if done.all():
                    break
                if step + 1 < self.max_new_tokens:  # ended rows go on with padding, as they do there
                    branches.append(tokens[:, None].tolist())
        self._end_stream()
        return GenerateDecoderOnlyOutput(
            sequences=cast(LongTensor, ids),
            scores=cast(Any, scores),
            logits=cast(Any, raw),
        )

    async def _branches(self, sampling: Sampling) -> Frontier:
        count = len(self.input_ids) // len(self.prompts)
        roots = await self.decoder.roots([prompt.tolist() for prompt in self.prompts], sampling=sampling)
        if count == 1:
            return roots
        with roots:
            return roots.fork(count)

    def _processed(self, processors: LogitsProcessorList, ids: Tensor, logits: Tensor) -> Tensor:
        """Applies processors; the repetition penalty does not see padding, so that a prompt's text is its own."""
        count = len(ids) // len(self.prompts)
        padding = [self.input_ids.shape[1] - len(prompt) for prompt in self.prompts for _ in range(count)]
        for processor in processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor) and any(padding):
                pairs = ((ids[i : i + 1, skip:], logits[i : i + 1]) for i, skip in enumerate(padding))
                logits = torch.cat([processor(cast(Any, row), cast(Any, scores)) for row, scores in pairs])
            else:
                logits = processor(cast(Any, ids), cast(Any, logits))
        return logits

    def _ended(self, ids: Tensor, scores: tuple[Tensor, ...] | None) -> np.ndarray:
        """Hands the last token of each row on, and returns `[n]` bool, True for rows that end with it."""
        if self.streamer is not None:
            self.streamer.put(ids[:, -1].cpu())
        stopped = self.criteria(cast(LongTensor, ids), cast(Any, scores)).numpy(force=True)
        return np.isin(ids[:, -1].numpy(force=True), self.eos) | stopped

    def _end_stream(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def assemble(prompts: Tensor, texts: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Lays out `[n, prompt_len + longest]`: prompts as they were, then the new tokens, then padding."""
    new = torch.full((len(texts), max(map(len, texts))), pad, dtype=torch.int64, device="cpu")
    for row, text in zip(new, texts, strict=True):
        row[: len(text)] = torch.as_tensor(text, device="cpu")
    return torch.cat([prompts.long(), new.to(prompts.device)], dim=1)
