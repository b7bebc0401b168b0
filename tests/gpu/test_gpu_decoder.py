"""Decoding on a GPU: CUDA graphs, steps that do not wait for the device, and the texts of the CPU in fp32."""

import asyncio

import pytest
import torch
from support.gpu_cases import DEVICE, GPU
from support.transformers_models import make_model

import treedecode as td
from treedecode.decoding.beam_graph_step import BeamGraphStep
from treedecode.engine.graph_runner import ReplayedBatch
from treedecode.engine.graph_step import GraphStep
from treedecode.models import TransformersModel

pytestmark = GPU
PROMPTS = [list(range(5, 40)), [7, 8, 9], list(range(5, 22)), [90]]
SAMPLED = td.Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=3, ignore_eos=True)
GREEDY = td.Sampling(temperature=0.0, ignore_eos=True)
LONG = {"max_position_embeddings": 2048}


@pytest.fixture
def decoder():
    """Makes decoders of a tiny model in fp32, and checks at the end that none has leaked branches or pages."""
    decoders = []

    def make(name="llama", device=DEVICE, captured=True, overrides=(), **options):
        model = make_model(name, **dict(overrides)).to(device)
        options = {"kv_memory": "16MiB", "cuda_graphs": captured} | options
        decoders.append(td.Decoder(TransformersModel(model), page_size=4, **options))
        return decoders[-1]

    yield make
    for dec in decoders:
        dec.check_integrity()
        assert dec.num_branches == 0
        dec.close()


@pytest.fixture(autouse=True)
def replays(monkeypatch):
    """Records the class of each step replayed; a replay that waits for the device is an error."""
    seen, replay = [], GraphStep.replay

    def watched(step, number):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return replay(step, number)
        finally:
            torch.cuda.set_sync_debug_mode(before)
            seen.append(type(step))

    monkeypatch.setattr(GraphStep, "replay", watched)
    return seen


@pytest.fixture
def launches(monkeypatch):
    """Records the number of steps in flight after each launch of a sampling step."""
    seen, launch = [], ReplayedBatch.launch
    monkeypatch.setattr(ReplayedBatch, "launch", lambda run: (launch(run), seen.append(run.num_in_flight)))
    return seen


def flat(outs):
    return [out for branches in outs for out in branches]


def tokens(outs):
    return [[out.token_ids for out in branches] for branches in outs]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_captured_steps_give_the_texts_of_steps_op_by_op(decoder, launches, sampling):
    settings = {"num_branches": 5, "sampling": sampling, "max_new_tokens": 30}
    plain, captured = decoder(captured=False), decoder()
    want = plain.generate(PROMPTS, **settings)
    assert launches == []
    got = captured.generate(PROMPTS, **settings)
    assert launches.count(2) > 20
    assert tokens(got) == tokens(want)
    for ours, theirs in zip(flat(got), flat(want), strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_texts_are_those_of_the_cpu(decoder, name):
    settings = {"num_branches": 3, "sampling": SAMPLED, "max_new_tokens": 20}
    want = decoder(name, "cpu").generate(PROMPTS, **settings)
    assert tokens(decoder(name).generate(PROMPTS, **settings)) == tokens(want)


def test_a_thousand_steps_without_waiting(decoder, launches, replays):
    dec = decoder(overrides=LONG.items(), kv_memory="64MiB")
    (outs,) = dec.generate([PROMPTS[1]], num_branches=6, sampling=SAMPLED, max_new_tokens=1001)
    assert [len(out.token_ids) for out in outs] == [1001] * 6
    assert launches == [1] + [2] * 999
    assert len(replays) == 1000


@pytest.mark.parametrize("num_pages", [30, 50])
def test_out_of_pages_within_a_run(decoder, launches, num_pages):
    """The device refuses a step, the host learns of it a step later, and the text is the same."""
    settings = {"num_branches": 4, "sampling": SAMPLED, "max_new_tokens": 30}
    want = tokens(decoder().generate(PROMPTS, **settings))
    model = make_model("llama")
    page_bytes = 2 * 3 * 2 * 4 * 16 * model.dtype.itemsize
    dec = decoder(kv_memory=num_pages * page_bytes, prefill_tokens=16)
    assert tokens(dec.generate(PROMPTS, **settings)) == want
    assert dec.stats.num_preemptions > 0
    assert 2 in launches


def test_a_stop_and_forks_leave_no_trace(decoder, launches):
    """The host sees a stop when the next step is in flight already."""
    plain, dec = decoder(captured=False), decoder()
    stop = plain.generate([PROMPTS[1]], sampling=SAMPLED, max_new_tokens=30)[0][0].token_ids[10]

    async def search(dec):
        with await dec.roots([PROMPTS[1]], sampling=SAMPLED) as frontier:
            await frontier.extend(max_new_tokens=30, stop=[stop])
            with frontier.fork(3) as forks:
                await forks.extend(max_new_tokens=30)
                forked = forks.token_ids()
            await frontier.extend(max_new_tokens=10)
            return forked, frontier.token_ids()

    want = asyncio.run(search(plain))
    assert asyncio.run(search(dec)) == want
    assert launches.count(2) > 20


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beam_search_finds_the_beams_of_the_cpu(decoder, replays, early_stopping):
    settings = {"num_beams": 4, "max_new_tokens": 12, "length_penalty": 0.7, "early_stopping": early_stopping}
    want = decoder(device="cpu", captured=False).beam_search(PROMPTS, **settings)
    plain = decoder(captured=False).beam_search(PROMPTS, **settings)
    assert replays == []
    captured = decoder().beam_search(PROMPTS, **settings)
    assert replays.count(BeamGraphStep) >= 10
    for got in (plain, captured):
        assert tokens(got) == tokens(want)
        for ours, theirs in zip(flat(got), flat(want), strict=True):
            assert ours.cum_logprob == pytest.approx(theirs.cum_logprob, abs=1e-3)


def test_bf16_gives_the_same_tokens_again(decoder):
    """In bf16 there is no reference, but the same call on a fresh decoder gives the same tokens."""
    texts = []
    for _ in range(2):
        model = make_model("llama", torch.bfloat16).to(DEVICE)
        with td.Decoder(TransformersModel(model), kv_memory="16MiB") as dec:
            outs = dec.generate(PROMPTS, num_branches=5, sampling=SAMPLED, max_new_tokens=30)
            texts.append((tokens(outs), [out.logprobs for branches in outs for out in branches]))
    assert texts[0] == texts[1]


def test_a_forward_that_waits_is_not_captured(decoder):
    """The error names the argument to change, and the device still works: the same model decodes op by op."""
    model = make_model("llama").to(DEVICE)
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output.sum().item())
    settings = {"num_branches": 3, "sampling": SAMPLED, "max_new_tokens": 10}
    stream = torch.cuda.current_stream()
    with td.Decoder(TransformersModel(model), kv_memory="16MiB") as dec, pytest.raises(RuntimeError) as error:
        dec.generate(PROMPTS, **settings)
    assert "cuda_graphs=False" in "".join(error.value.__notes__)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(3, device=DEVICE).isfinite().all()
    with td.Decoder(TransformersModel(model), kv_memory="16MiB", cuda_graphs=False) as dec:
        assert tokens(dec.generate(PROMPTS, **settings)) == tokens(decoder().generate(PROMPTS, **settings))


def test_a_row_whose_logits_are_nan_fails_alone(decoder):
    dec = decoder()
    dec.generate([PROMPTS[0]], sampling=GREEDY, max_new_tokens=2)
    with torch.no_grad():
        dec.model.model.get_input_embeddings().weight[11] = torch.nan

    async def both():
        return await asyncio.gather(
            dec.generate_async([[5, 6, 7]], sampling=td.Sampling(temperature=0.0), max_new_tokens=1),
            dec.generate_async([[5, 6, 11]], num_branches=2, sampling=SAMPLED, max_new_tokens=4),
            return_exceptions=True,
        )

    good, bad = asyncio.run(both())
    assert isinstance(bad, ValueError)
    assert "NaN" in str(bad)
    assert isinstance(good, list)


def test_from_pretrained(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = make_model("llama")
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    settings = {"num_branches": 2, "sampling": GREEDY, "max_new_tokens": 10}
    texts = []
    for device in ("cpu", DEVICE):
        with td.Decoder.from_pretrained(tmp_path, dtype="float32", device=device, kv_memory="16MiB") as dec:
            assert dec.model.device.type == torch.device(device).type
            texts.append(tokens(dec.generate(PROMPTS, **settings)))
    assert texts[0] == texts[1]
