"""Prometheus metrics of a decoder and of runs on it (extra `metrics`)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from treedecode.reporting.monitor import Monitor

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder
    from treedecode.search.solutions import Solution

PREFIX = "treedecode:"
_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def _client() -> Any:
    try:
        import prometheus_client
        import prometheus_client.core  # which the package does not import
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "prometheus_client is not installed; pip install 'treedecode[metrics]'", name="prometheus_client"
        ) from error
    return prometheus_client


class DecoderCollector:
    """Reads a decoder's metrics when they are scraped: `registry.register(DecoderCollector(decoder))`.

    Args:
        labels: on every metric, for instance the model's name.

    Raises:
        ModuleNotFoundError: the client library is not installed.
    """

    def __init__(self, decoder: "Decoder", labels: dict[str, str] | None = None) -> None:
        self._core = _client().core
        self._decoder, self._monitor, self._labels = decoder, Monitor(decoder), labels or {}

    def collect(self) -> Iterator[Any]:
        """Yields the metrics; the client library's registry calls this."""
        load, stats = self._monitor.read(), self._decoder.stats
        yield self._gauge("branches", "Branches alive.", load.num_branches)
        yield self._gauge("branches_max", "Branches that can be alive at once.", load.max_branches)
        yield self._gauge("pages_used", "KV pages in use, by branches or by the prefix index.", load.num_pages)
        yield self._gauge("pages_max", "KV pages there are.", load.max_pages)
        yield self._counter("forwards", "Forwards of the model.", stats.num_forwards)
        tokens = self._counter("tokens", "Tokens, by what was done with them.")
        for kind, count in (
            ("prefill", stats.num_prefill_tokens),
            ("decode", stats.num_decode_tokens),
            ("sampled", stats.num_sampled_tokens),
            ("prefix_hit", stats.num_prefix_tokens),
        ):
            tokens.add_metric([*self._labels.values(), kind], count)
        yield tokens
        yield self._counter("preemptions", "Branches that lost their pages for a time.", stats.num_preemptions)
        yield self._counter("busy_seconds", "Time in forwards and what goes with each.", stats.busy_seconds)

    def _gauge(self, name: str, text: str, value: float) -> Any:
        family = self._core.GaugeMetricFamily(PREFIX + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float | None = None) -> Any:
        labels = [*self._labels] if value is not None else [*self._labels, "kind"]
        family = self._core.CounterMetricFamily(PREFIX + name, text, labels=labels)
        if value is not None:
            family.add_metric(list(self._labels.values()), value)
        return family


class RunMetrics:
    """Counts the problems of runs; `observe` is a callback of `solve`.

    Args:
        strategy: the label on every metric.
        registry: where the metrics are registered; None = the client library's own.

    Raises:
        ModuleNotFoundError: the client library is not installed.
        ValueError: the registry has such metrics already.
    """

    def __init__(self, strategy: str, registry: Any = None) -> None:
        client = _client()
        self._strategy, registry = strategy, client.REGISTRY if registry is None else registry

        def counter(name: str, text: str) -> Any:
            return client.Counter(PREFIX + name, text, ["strategy"], registry=registry)

        self._problems = counter("problems", "Problems that have been searched.")
        self._correct = counter("problems_correct", "Problems whose solution was graded as right.")
        self._cut = counter("problems_cut", "Problems that the budget ended.")
        self._tokens = counter("problem_generated_tokens", "Tokens generated for problems that have ended.")
        self._seconds = client.Histogram(
            f"{PREFIX}problem_seconds",
            "Wall time of a problem's search; others ran meanwhile.",
            ["strategy"],
            registry=registry,
            buckets=_SECONDS,
        )

    def observe(self, solution: "Solution") -> None:
        """Counts one solution."""
        self._problems.labels(self._strategy).inc()
        self._correct.labels(self._strategy).inc(bool(solution.correct))
        self._cut.labels(self._strategy).inc(solution.is_cut)
        self._tokens.labels(self._strategy).inc(solution.spending.generated_tokens)
        self._seconds.labels(self._strategy).observe(solution.seconds)


def serve(decoder: "Decoder", strategy: str, port: int) -> tuple[RunMetrics, Any]:
    """Serves the metrics of a decoder and of a run on it over HTTP, from a thread.

    Returns:
        The run's metrics, and a function that ends the serving.

    Raises:
        ModuleNotFoundError: the client library is not installed.
        OSError: the port is taken.
    """
    client = _client()
    registry = client.CollectorRegistry()
    registry.register(DecoderCollector(decoder))
    metrics = RunMetrics(strategy, registry)
    server, thread = client.start_http_server(port, registry=registry)

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return metrics, end
