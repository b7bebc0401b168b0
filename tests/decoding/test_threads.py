"""Several threads on one model: they take turns, find the right texts, and leave the model as it was."""

import sys
import threading

import pytest
import torch
from support.generate_cases import make_model

import treedecode

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [5, 6, 7, 8, 9, 10, 11] * 3


@pytest.fixture(autouse=True)
def eager_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def plain(model):
    ids = torch.tensor([PROMPT])
    return model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(PROMPT) :].tolist()


def in_threads(*calls):
    """Runs calls, each in a thread of its own, and returns their results."""
    results = [None] * len(calls)

    def run(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("shared", ["model", "config"])
def test_decoders_that_share(shared):
    first = make_model()
    second = first
    if shared == "config":
        second = type(first)(first.config).eval()
        second.lm_head = torch.nn.Linear(48, first.config.vocab_size)
        assert second.config is first.config
    models = [first, second]
    want = [[plain(model)] * 15 for model in models]
    decoders = [treedecode.Decoder(model) for model in models]
    greedy = treedecode.Sampling(temperature=0, ignore_eos=True)

    def texts(decoder):
        calls = (decoder.generate(PROMPT, max_new_tokens=12, sampling=greedy) for _ in range(15))
        return [branches[0].token_ids for (branches,) in calls]

    assert in_threads(*(lambda decoder=decoder: texts(decoder) for decoder in decoders)) == want
    assert first.config._attn_implementation == "sdpa"
    assert plain(first) == want[0][0]


def test_first_calls_of_generate():
    for seed in range(4):
        model = make_model(seed=seed)
        want = plain(model)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}

        def call(model=model, options=options):
            out = model.generate(torch.tensor([PROMPT]), **options, custom_generate=treedecode.generate)
            return out[0, len(PROMPT) :].tolist()

        assert in_threads(call, call, call) == [want] * 3
        assert model.config._attn_implementation == "sdpa"
