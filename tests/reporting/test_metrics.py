import sys
from types import SimpleNamespace

import pytest

from treedecode.accounting.meter import Spending

prometheus_client = pytest.importorskip("prometheus_client")

from treedecode.reporting import metrics  # noqa: E402 (only where the client is there)


def solution(correct=None, is_cut=False, tokens=10, seconds=0.3):
    spending = Spending(generated_tokens=tokens)
    return SimpleNamespace(correct=correct, is_cut=is_cut, spending=spending, seconds=seconds)


@pytest.fixture
def registry():
    return prometheus_client.CollectorRegistry()


def test_a_decoder_is_read_when_it_is_scraped(make_decoder, registry):
    decoder = make_decoder(max_branches=16)
    registry.register(metrics.DecoderCollector(decoder, {"model": "fake"}))

    def value(name, **labels):
        return registry.get_sample_value(f"treedecode:{name}", {"model": "fake", **labels})

    assert value("forwards_total") == value("tokens_total", kind="sampled") == 0
    assert (value("branches"), value("branches_max"), value("pages_max")) == (0, 16, 200)
    decoder.generate(["one two three four five", "one two three four six"], num_branches=3, max_new_tokens=7)
    decoder.generate("one two three four five", max_new_tokens=2)
    stats = decoder.stats
    assert value("forwards_total") == stats.num_forwards > 0
    assert value("tokens_total", kind="sampled") == stats.num_sampled_tokens > 0
    assert value("tokens_total", kind="prefill") == stats.num_prefill_tokens > 0
    assert value("tokens_total", kind="decode") == stats.num_decode_tokens
    assert value("tokens_total", kind="prefix_hit") == stats.num_prefix_tokens > 0
    assert value("preemptions_total") == stats.num_preemptions
    assert value("busy_seconds_total") == stats.busy_seconds > 0
    assert value("pages_used") == len(decoder.engine.store.index.pages()) > 0

    async def hold():
        with await decoder.roots(["x"]) as root, root.fork(4):
            return value("branches")

    assert decoder.run(hold()) == 5


def test_runs_are_counted(registry):
    run = metrics.RunMetrics("best", registry)
    for one in (
        solution(correct=True, tokens=7),
        solution(correct=False, is_cut=True, seconds=3.0),
        solution(correct=None, seconds=9999.0),
    ):
        run.observe(one)

    def value(name, **labels):
        return registry.get_sample_value(f"treedecode:{name}", {"strategy": "best", **labels})

    assert value("problems_total") == 3
    assert value("problems_correct_total") == 1
    assert value("problems_cut_total") == 1
    assert value("problem_generated_tokens_total") == 27
    assert value("problem_seconds_sum") == pytest.approx(0.3 + 3.0 + 9999.0)
    assert [value("problem_seconds_bucket", le=le) for le in ("0.2", "0.5", "5.0", "500.0", "+Inf")] == [0, 1, 2, 2, 3]


def test_every_name_has_the_prefix(make_decoder, registry):
    registry.register(metrics.DecoderCollector(make_decoder()))
    metrics.RunMetrics("best", registry).observe(solution())
    lines = prometheus_client.generate_latest(registry).decode().splitlines()
    assert all(line.split()[2 if line.startswith("#") else 0].startswith("treedecode:") for line in lines)


def test_without_the_client_it_says_what_to_install(monkeypatch, make_decoder):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'treedecode\[metrics\]'"):
        metrics.RunMetrics("best")
