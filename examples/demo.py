"""The main job on a real model: 16 answers to a word problem with a majority vote, then beam search; and Transformers.

Run it with `make demo`, or `python -m examples.demo --help` in an environment that has treedecode installed.
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
class Run:
    """What one way of doing the work gave."""

    texts: list[str]
    num_tokens: int
    seconds: float

    def speed(self) -> str:
        return f"{self.num_tokens} tokens in {self.seconds:.1f} s, {self.num_tokens / self.seconds:.0f} tokens/s"


def final_answer(text: str) -> str | None:
    """The number after "####" in a solution."""
    found = re.search(r"####\s*(-?[\d,]+)", text)
    return found[1].replace(",", "") if found else None


def vote(texts: Sequence[str]) -> tuple[str | None, str]:
    """The answer most texts end in, those without one abstaining, and the count of votes as text."""
    votes = collections.Counter(answer for text in texts if (answer := final_answer(text)) is not None)
    first = votes.most_common(6)
    return (first[0][0] if first else None), ", ".join(f"{answer} x{count}" for answer, count in first)


@contextlib.contextmanager
def progress(dec: td.Decoder, prompt_len: int, num_new: int) -> Iterator[None]:
    """Progress bars for prefill and decode, fed from the decoder's own counters while the block runs."""
    done = threading.Event()

    def counts() -> tuple[int, int]:
        stats = dec.stats
        return stats.num_prefill_tokens + stats.num_prefix_tokens, stats.num_decode_tokens

    before = counts()

    def watch() -> None:
        ended = False
        for index, (name, total) in enumerate((("prefill", prompt_len), ("decode", num_new))):
            with tqdm(total=total, desc=f"  {name}", unit="tok") as bar:
                begun = -1  # of the next bar: the prompt's last tokens may count as the first of decoding
                while not ended and bar.n < total and begun < 1:
                    ended = done.wait(0.1)
                    done_now = [now - start for now, start in zip(counts(), before, strict=True)]
                    bar.update(min(total, done_now[index]) - bar.n)
                    begun = done_now[1] if index == 0 else 0
                bar.total = bar.n  # branches may stop early

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def sample(dec: td.Decoder, prompt: list[int], num_branches: int) -> Run:
    """Self-consistency's first half: `num_branches` solutions of one prompt."""
    sampling = td.Sampling(temperature=0.5, top_p=0.95, seed=0)
    begin = time.perf_counter()
    with progress(dec, len(prompt), num_branches * MAX_NEW_TOKENS):
        (outs,) = dec.generate(
            [prompt], num_branches=num_branches, sampling=sampling, max_new_tokens=MAX_NEW_TOKENS, stop="\n"
        )
    return Run([out.text for out in outs], sum(len(out.token_ids) for out in outs), time.perf_counter() - begin)


def beam_search(dec: td.Decoder, prompt: list[int], num_beams: int) -> Run:
    """The likeliest solutions, best first."""
    begin = time.perf_counter()
    with progress(dec, len(prompt), num_beams * MAX_NEW_TOKENS):
        (outs,) = dec.beam_search([prompt], num_beams=num_beams, max_new_tokens=MAX_NEW_TOKENS, stop="\n")
    # A beam search computes `num_beams` tokens a step; which of them end up in a result is known only at its end.
    num_steps = max(len(out.token_ids) for out in outs)
    return Run([out.text for out in outs], num_steps * num_beams, time.perf_counter() - begin)


class _Steps(StoppingCriteria):
    """Moves a bar on with every step of `transformers.generate`, and never stops it."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def transformers_generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], **settings: object
) -> Run:
    """The same work by Transformers: every sequence has a prompt and a cache of its own."""
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
            stopping_criteria=StoppingCriteriaList([_Steps(bar)]),
            **settings,
        )
    seconds = time.perf_counter() - begin
    new = [[t for t in row if t != tokenizer.eos_token_id] for row in out[:, len(prompt) :].tolist()]
    num_beams = settings.get("num_beams")
    num_tokens = sum(map(len, new)) if num_beams is None else max(map(len, new)) * int(str(num_beams))
    return Run([tokenizer.decode(row) for row in new], num_tokens, seconds)


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def memory_line(dec: td.Decoder, num_branches: int, prompt_len: int, num_tokens: int) -> str:
    """What the decoder held at its peak, and what a cache per branch would hold."""
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

    print("Download: SmolLM2-135M-Instruct (kept for later runs)", flush=True)
    path = gguf_path()
    print("Load: unpacking the weights takes a while the first time", flush=True)
    begin = time.perf_counter()
    dec = td.Decoder.from_pretrained(path, dtype=torch.bfloat16)
    print(f"  {time.perf_counter() - begin:.1f} s")
    prompt = dec.encode(f"{EXAMPLES}Question: {QUESTION}\nAnswer:")
    dec.generate([dec.encode("Hello")], num_branches=2, max_new_tokens=2)  # first calls set up threads and buffers

    print(f"\n{QUESTION}\n(right: {SOLUTION}; {len(prompt)} prompt tokens with four worked examples)", flush=True)
    sampled = sample(dec, prompt, branches)
    print(f"\n{branches} branches\n  {sampled.speed()}")
    print(f"  {memory_line(dec, branches, len(prompt), sampled.num_tokens)}")
    winner, votes = vote(sampled.texts)
    print(f"  votes: {votes}")
    print(f"  majority: {winner}; for instance:{next((t for t in sampled.texts if final_answer(t) == winner), '')}")

    searcher = td.Decoder(dec.model, dec.tokenizer)  # its own pages: nothing of the first run is found in its index
    searched = beam_search(searcher, prompt, beams)
    print(f"\nBeam search, {beams} beams\n  {searched.speed()}")
    print(f"  {memory_line(searcher, beams, len(prompt), searched.num_tokens)}")
    print(f"  best:{searched.texts[0]}", flush=True)
    if arguments.alone:
        return

    print("\ntransformers.generate, the same model and prompt", flush=True)
    model, tokenizer = load_pretrained(path, dtype=torch.bfloat16)
    transformers_generate(model, tokenizer, prompt[:8], num_beams=2)
    theirs = transformers_generate(
        model, tokenizer, prompt, do_sample=True, temperature=0.5, top_p=0.95, top_k=0, num_return_sequences=branches
    )
    print(f"  num_return_sequences={branches}: {theirs.speed()}")
    print(
        f"    votes: {vote(theirs.texts)[1]}",
        flush=True,
    )
    their_beams = transformers_generate(
        model, tokenizer, prompt, do_sample=False, num_beams=beams, num_return_sequences=beams
    )
    print(f"  num_beams={beams}: {their_beams.speed()}\n    best:{their_beams.texts[0].rstrip()}")

    print("\n| | treedecode | transformers | tokens/s ratio |\n|---|---|---|---|")
    for name, ours, peer in ((f"{branches} samples", sampled, theirs), (f"{beams} beams", searched, their_beams)):
        ratio = ours.num_tokens / ours.seconds / (peer.num_tokens / peer.seconds)
        print(f"| {name} | {ours.seconds:.1f} s | {peer.seconds:.1f} s | {ratio:.1f}x |")


if __name__ == "__main__":
    main()
