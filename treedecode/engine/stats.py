"""Stats: counts of the work that a decoder has done."""

from dataclasses import dataclass


@dataclass
class Stats:
    """The work of a decoder since it was made."""

    num_forwards: int = 0
    num_prefill_tokens: int = 0  # computed several at a time: prompts, forced text, recomputation
    num_decode_tokens: int = 0  # computed one per branch and forward
    num_sampled_tokens: int = 0
    num_prefix_tokens: int = 0  # not computed: found in the prefix index
    num_preemptions: int = 0
    busy_seconds: float = 0.0  # in forwards and what goes with each
