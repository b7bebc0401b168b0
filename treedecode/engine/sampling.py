"""Sampling: the settings by which a branch draws its next token."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from treedecode.common.validation import integer, number, shown

# Settings are used in fp32. One that becomes infinite or 0 there would fail every row of the step.
_FP32_MIN, _FP32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127


@dataclass(frozen=True)
class Sampling:
    """Settings of one branch's random draws; the filters compose in the order temperature, top_k, top_p, min_p.

    Args:
        temperature: divides the logits; 0 takes the most likely token (lowest id on a tie).
        top_k: keep the `top_k` most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches `top_p`; 1 keeps all.
        min_p: drop tokens less likely than `min_p` times the most likely one; 0 keeps all.
        seed: the text depends on it and the prompt alone, never on what else is decoding; None draws a fresh seed from
            torch's default generator.
        ignore_eos: keep going past the model's end-of-sequence tokens.
        repetition_penalty: divides positive and multiplies negative logits of every token already in the branch, prompt
            included (1909.05858); 1 is off.
        min_new_tokens: no end-of-sequence token, stop token or stop string before this many new tokens.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    @classmethod
    def from_generation_config(cls, config: Any, **settings: Any) -> "Sampling":
        """Makes the sampling that a checkpoint asks for.

        Args:
            config: a `transformers.GenerationConfig`. Where it is None or decodes greedily, the defaults count.
            settings: of `Sampling`, in place of those of the config.

        Raises:
            TypeError: a setting has the wrong type.
            ValueError: a setting is out of range.
        """
        if getattr(config, "do_sample", False):
            names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            values = {name: getattr(config, name, None) for name in names}
            settings = {name: value for name, value in values.items() if value is not None} | settings
        return cls(**settings)

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            number(name, getattr(self, name))
        for name in ("top_k", "min_new_tokens", *(() if self.seed is None else ("seed",))):
            integer(name, getattr(self, name))
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos: expected a bool, got {self.ignore_eos!r}")
        if not 0 <= self.temperature <= _FP32_MAX:
            raise ValueError(f"temperature: expected a number >= 0 that fp32 can hold, got {self.temperature}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k: expected 0 <= top_k < 2**31 (0 keeps every token), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected 0 <= min_p <= 1, got {self.min_p}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected a 64-bit integer, got {self.seed}")
        if not _FP32_MIN <= self.repetition_penalty <= _FP32_MAX:
            raise ValueError(
                f"repetition_penalty: expected a number > 0 that fp32 can hold, got {self.repetition_penalty}"
            )
        if self.min_new_tokens < 0:
            raise ValueError(f"min_new_tokens: expected >= 0, got {self.min_new_tokens}")


def sampling_or(sampling: Sampling | None, default: Sampling) -> Sampling:
    """Returns `sampling`, or `default` where it is None.

    Raises:
        TypeError: it is something else.
    """
    if sampling is not None and not isinstance(sampling, Sampling):
        raise TypeError(f"sampling: expected a treedecode.Sampling, got {shown(sampling)}")
    return default if sampling is None else sampling


def root_seed(sampling: Sampling) -> np.ndarray:
    """Returns the seed that was asked for, or draws a fresh one."""
    if sampling.seed is not None:
        return np.array(sampling.seed, np.int64)
    import torch  # takes seconds, and settings alone do not need it

    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu").numpy()
