"""Samples 16 answers to a word problem and votes, then searches with beams; Transformers does the same for comparison.

`make demo` runs it, or `python -m examples.demo` in an environment that has treedecode installed.
"""

import argparse
import collections
import contextlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

import treedecode as td
from examples.smollm2 import gguf_path
from treedecode.models import load_pretrained

EXAMPLES = """\
Question: Lena has 4 bags with 6 marbles in each bag. She finds 5 more marbles. How many marbles does she have?
Answer: The bags hold 4 * 6 = 24 marbles. With the 5 she finds, she has 24 + 5 = 29 marbles. #### 29

Question: A baker makes 40 rolls and sells 28 of them in the morning. In the afternoon 7 more. How many are left?
Answer: He sells 28 + 7 = 35 rolls. There are 40 - 35 = 5 rolls left. #### 5

Question: A ticket costs 9 dollars. Ben buys 3 tickets and pays with a 50 dollar note. How much change does he get?
Answer: The tickets cost 3 * 9 = 27 dollars. He gets 50 - 27 = 23 dollars back. #### 23

Question: Sara walks 2 miles every day, and 3 extra miles on Sunday. How many miles does she walk in a week?
Answer: In 7 days she walks 7 * 2 = 14 miles. With the extra miles she walks 14 + 3 = 17 miles. #### 17

"""
QUESTION = "A train has 4 cars with 20 seats in each car. How many seats does the train have?"
SOLUTION = "80"
MAX_NEW_TOKENS = 64


@dataclass
class Completions:
    """The texts that one way of decoding gave, and its cost."""

    texts: list[str]
    num_tokens: int
    seconds: float

    def speed(self) -> str:
        return f"{self.num_tokens} tokens in {self.seconds:.1f} s, {self.num_tokens / self.seconds:.0f} tokens/s"


def final_answer(text: str) -> str | None:
    """Returns the number after "####" in a solution; None without one."""
    match = re.search(r"####\s*(-?[\d,]+)", text)
    return match[1].replace(",", "") if match else None


def vote(texts: Sequence[str]) -> tuple[str | None, str]:
    """Returns the answer that most texts end in, and the votes as text. Texts without an answer do not vote."""
    votes = collections.Counter(answer for text in texts if (answer := final_answer(text)) is not None)
    ranking = votes.most_common(6)
    return (ranking[0][0] if ranking else None), ", ".join(f"{answer} x{count}" for answer, count in ranking)


@contextlib.contextmanager
def progress(dec: td.Decoder, prompt_len: int, num_new: int) -> Iterator[None]:
    """Shows a bar for prefill and then one for decoding while the block runs, from the decoder's own counters."""
    ended = threading.Event()

    def counts() -> tuple[int, int]:
        stats = dec.stats
        return stats.num_prefill_tokens + stats.num_prefix_tokens, stats.num_decode_tokens

    num_prefilled, num_decoded = counts()

    def show() -> None:
        with tqdm(total=prompt_len, desc="  prefill", unit="tok") as bar:
            # The forward of the prompt's last tokens may count as decoding: the first decoded token ends this bar too.
            while bar.n < prompt_len and counts()[1] == num_decoded and not ended.wait(0.1):
                bar.update(min(prompt_len, counts()[0] - num_prefilled) - bar.n)
            bar.update(prompt_len - bar.n)
        with tqdm(total=num_new, desc="  decode", unit="tok") as bar:
            while bar.n < num_new and not ended.wait(0.1):
                bar.update(min(num_new, counts()[1] - num_decoded) - bar.n)
            bar.update(min(num_new, counts()[1] - num_decoded) - bar.n)
            bar.total = bar.n  # branches may stop early

    thread = threading.Thread(target=show)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def sample(dec: td.Decoder, prompt: list[int], num_branches: int) -> Completions:
    """Samples `num_branches` solutions of one prompt."""
    sampling = td.Sampling(temperature=0.5, top_p=0.95, seed=0)
    begin = time.perf_counter()
    with progress(dec, len(prompt), num_branches * MAX_NEW_TOKENS):
        (outs,) = dec.generate(
            [prompt], num_branches=num_branches, sampling=sampling, max_new_tokens=MAX_NEW_TOKENS, stop="\n"
        )
    return Completions([out.text for out in outs], sum(len(out.token_ids) for out in outs), time.perf_counter() - begin)


def beam_search(dec: td.Decoder, prompt: list[int], num_beams: int) -> Completions:
    """Searches for the likeliest solutions, best first."""
    begin = time.perf_counter()
    with progress(dec, len(prompt), num_beams * MAX_NEW_TOKENS):
        (outs,) = dec.beam_search([prompt], num_beams=num_beams, max_new_tokens=MAX_NEW_TOKENS, stop="\n")
    # Every step computes a token of each beam, also of beams that end in no result.
    num_steps = max(len(out.token_ids) for out in outs)
    return Completions([out.text for out in outs], num_steps * num_beams, time.perf_counter() - begin)


class StepBar(StoppingCriteria):
    """Advances a bar with every step of `transformers.generate`, and never stops it."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def transformers_generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], **settings: object
) -> Completions:
    """Decodes with Transformers, where every sequence has a copy of the prompt and a cache of its own."""
    torch.manual_seed(0)
    ids = torch.tensor([prompt])
    begin = time.perf_counter()
    with tqdm(total=MAX_NEW_TOKENS, desc="  steps", unit="step") as bar, torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            stop_strings="\n",
            tokenizer=tokenizer,
            pad_token_id=tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([StepBar(bar)]),
            **settings,
        )
    seconds = time.perf_counter() - begin
    new_ids = [[t for t in row if t != tokenizer.eos_token_id] for row in out[:, len(prompt) :].tolist()]
    num_beams = settings.get("num_beams")
    num_tokens = sum(map(len, new_ids)) if num_beams is None else max(map(len, new_ids)) * int(str(num_beams))
    return Completions([tokenizer.decode(row) for row in new_ids], num_tokens, seconds)


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def memory_line(dec: td.Decoder, num_branches: int, prompt_len: int, num_tokens: int) -> str:
    """Compares the decoder's memory at its peak with that of a cache per branch."""
    pool = dec.pool
    copied = (num_branches * prompt_len + num_tokens) * pool.page_bytes / pool.page_size
    held = pool.peak_used_pages * pool.page_bytes
    return (
        f"KV memory: {mib(held)} held at the peak; {num_branches} copied caches: {mib(copied)} ({copied / held:.1f}x)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--branches", type=int, default=16, help="solutions to sample (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=8, help="beams of the beam search (default: %(default)s)")
    parser.add_argument("--alone", action="store_true", help="do not run transformers.generate for comparison")
    arguments = parser.parse_args()
    branches, beams = arguments.branches, arguments.beams

    print("Downloading SmolLM2-135M-Instruct (kept for later runs)", flush=True)
    path = gguf_path()
    print("Loading it (the first time the weights are unpacked)", flush=True)
    begin = time.perf_counter()
    dec = td.Decoder.from_pretrained(path, dtype=torch.bfloat16)
    print(f"  {time.perf_counter() - begin:.1f} s")
    prompt = dec.encode(f"{EXAMPLES}Question: {QUESTION}\nAnswer:")
    dec.generate([dec.encode("Hello")], num_branches=2, max_new_tokens=2)  # first calls set up threads and buffers

    print(f"\n{QUESTION}\n(the answer is {SOLUTION}; {len(prompt)} prompt tokens with worked examples)", flush=True)
    sampled = sample(dec, prompt, branches)
    print(f"\n{branches} branches\n  {sampled.speed()}")
    print(f"  {memory_line(dec, branches, len(prompt), sampled.num_tokens)}")
    winner, votes = vote(sampled.texts)
    print(f"  votes: {votes}")
    print(f"  majority: {winner}; one of them:{next((t for t in sampled.texts if final_answer(t) == winner), '')}")

    searcher = td.Decoder(dec.model, dec.tokenizer)  # its prefix index does not hold the prompt yet
    searched = beam_search(searcher, prompt, beams)
    print(f"\nBeam search, {beams} beams\n  {searched.speed()}")
    print(f"  {memory_line(searcher, beams, len(prompt), searched.num_tokens)}")
    print(f"  best:{searched.texts[0]}", flush=True)
    if arguments.alone:
        return

    print("\ntransformers.generate, the same model and prompt", flush=True)
    model, tokenizer = load_pretrained(path, dtype=torch.bfloat16)
    transformers_generate(model, tokenizer, prompt[:8], num_beams=2)
    peer_sampled = transformers_generate(
        model, tokenizer, prompt, do_sample=True, temperature=0.5, top_p=0.95, top_k=0, num_return_sequences=branches
    )
    print(f"  num_return_sequences={branches}: {peer_sampled.speed()}")
    print(f"    votes: {vote(peer_sampled.texts)[1]}", flush=True)
    peer_searched = transformers_generate(
        model, tokenizer, prompt, do_sample=False, num_beams=beams, num_return_sequences=beams
    )
    print(f"  num_beams={beams}: {peer_searched.speed()}\n    best:{peer_searched.texts[0].rstrip()}")

    print("\n| | treedecode | transformers | tokens/s ratio |\n|---|---|---|---|")
    for name, ours, peer in (
        (f"{branches} samples", sampled, peer_sampled),
        (f"{beams} beams", searched, peer_searched),
    ):
        ratio = ours.num_tokens / ours.seconds / (peer.num_tokens / peer.seconds)
        print(f"| {name} | {ours.seconds:.1f} s | {peer.seconds:.1f} s | {ratio:.1f}x |")


if __name__ == "__main__":
    main()
