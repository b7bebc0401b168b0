"""Writes the report of a study from its JSON: sentences made from the numbers, a table, CSV."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treedecode.study.acceptance import FAILS, NO_ROW

Json = dict[str, Any]

_USED = 0.95  # of a budget; the report names rows that spent less
_QUIET = 0.1  # of a machine's cores; the report says if other work took more
COLUMNS = (
    "key", "label", "strategy", "settings", "problems", "accuracy", "accuracy_low", "accuracy_high", "tokens",
    "tokens_x", "flops_x", "kv_bytes_x", "kv_bytes_copied_x", "joules", "joules_x", "latency_s", "latency_x",
    "batched_s", "tokens_per_s", "occupancy", "serial_latency_s", "serial_latency_ratio", "serial_per_problem_s",
    "serial_tokens_per_s", "throughput_ratio", "tokens_per_correct", "flops_per_correct", "seconds_per_correct",
    "efficiency_ratio", "changed_answers", "budget", "passes", "num_cut", "error",
)  # fmt: skip
TITLES = {
    "self_consistency": "Self-consistency (tokens in multiples of one chain)",
    "best_of_n": "Best of n (tokens in multiples of one chain)",
    "dynamic_allocation": "Dynamic allocation (tokens in multiples of one chain)",
    "coverage": "Coverage (number of chains)",
}
PICTURES = {
    "accuracy": "Accuracy against compute, with 95% intervals",
    "latency": "Latency of one problem against compute",
    "coverage": "Coverage",
}


def write(study: Json, out: Path, pictures: list[str]) -> None:
    """Writes `report.md` and `rows.csv`.

    Args:
        pictures: names of the plots, such as `accuracy` for accuracy.png.
    """
    (out / "report.md").write_text("\n".join(report(study, pictures)) + "\n")
    with open(out / "rows.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(_flat(row) for row in study["rows"])


def report(study: Json, pictures: list[str]) -> Iterator[str]:
    """Yields the lines of the report, Markdown."""
    succeeded = [row for row in study["rows"] if row["error"] is None]
    yield "# Accuracy against compute"
    yield ""
    yield from _setting(study)
    yield ""
    yield from _table(succeeded)
    yield ""
    yield (
        "Accuracy has a 95% bootstrap interval over problems. Multiples are of the baseline's; KV bytes read count a "
        "page that branches share once (left) or once for every branch, as copied caches would (right). Alone: median "
        "seconds for one problem at a time. Batched: seconds per problem, all problems side by side. One by one: the "
        "same work, branches one after another over copied caches, in multiples of the time alone. Efficiency: "
        "accuracy gained, in points, per multiple of the baseline's tokens added."
    )
    yield ""
    yield (
        "Every interval is that of one comparison, and none is adjusted for how many comparisons there are: where "
        "nothing differs, about one in twenty shows a difference."
    )
    failed = [row for row in study["rows"] if row["error"] is not None]
    if failed:
        yield ""
        yield "Rows that failed:"
        yield ""
        yield from (f"* {row['label']}: {row['error']}" for row in failed)
    yield ""
    yield "## What the data say"
    yield ""
    yield from (f"* {sentence}" for sentence in sentences(study))
    yield ""
    yield "## Acceptance criteria"
    yield ""
    yield from _criteria(study["bars"])
    for name in pictures:
        yield ""
        yield f"![{PICTURES[name]}]({name}.svg)"
    if study["laws"]:
        yield ""
        yield "## Laws"
    for name, laws in study["laws"].items():
        yield ""
        yield f"### {TITLES.get(name, name)}"
        yield ""
        yield from _laws(laws)
    yield ""
    yield "## Where the numbers are from"
    yield ""
    machine = study["machine"]
    energy = succeeded[0]["energy_source"] if succeeded else "not measured"
    yield f"* {machine['cpu']}, {machine['threads']} threads, {machine['memory']}"
    yield f"* GPU: {machine['gpu']}; this ran on {machine['device']}"
    yield "* " + ", ".join(f"{name} {version}" for name, version in study["versions"].items())
    yield f"* commit {study['commit'] or 'unknown'}; energy: {energy}"
    if study["command"]:
        yield f"* `{study['command']}`"


def _criteria(criteria: list[Json]) -> Iterator[str]:
    """Yields a line for each criterion, and one for all those whose rows the study left out."""
    missing = dict.fromkeys(one["evidence"].removeprefix(NO_ROW) for one in criteria if _lacks_row(one))
    for criterion in criteria:
        if not _lacks_row(criterion):
            verdict = f"**{criterion['verdict']}**" if criterion["verdict"] == FAILS else criterion["verdict"]
            yield f"* {criterion['bar']}: {verdict} ({criterion['evidence']})"
    if missing:
        yield f"* {sum(map(_lacks_row, criteria))} others cannot be told without the rows {', '.join(missing)}"


def _lacks_row(criterion: Json) -> bool:
    return criterion["evidence"].startswith(NO_ROW)


def sentences(study: Json) -> Iterator[str]:
    """Yields the findings of the rows and laws as sentences."""
    rows = [row for row in study["rows"] if row["error"] is None]
    base, rest = rows[0], [row for row in rows[1:] if row["strategy"] != "chain_pool"]  # the pool is no strategy
    yield f"{base['label']} solves {_percent(base['accuracy'])} of {base['problems']} problems ({_ci(base)})."
    yield from _comparisons([row for row in rest if row["correct"] != base["correct"]])
    yield from (_same_verdict(row) for row in rest if row["correct"] == base["correct"])
    yield from (
        f"{row['label']} made {row['passes']:.1f} passes on average." for row in rest if row["passes"] is not None
    )
    thrifty = [row for row in rest if row["budget"] and row["tokens_x"] < _USED * row["budget"]]
    if thrifty:
        names = ", ".join(f"{row['label']}, which spent {_x(row['tokens_x'])}" for row in thrifty)
        yield (
            f"A budget was not used up by {names}: a problem gets no more chains than the gate has seen, and none that "
            "it expects nothing of."
        )
    timed = [row for row in rest if row["latency_x"] is not None and row["one_after_another"]]
    if timed:
        row = max(timed, key=lambda row: row["tokens_x"])
        yield (
            f"{row['label']} generates {_x(row['tokens_x'])} the tokens of a chain in {_x(row['latency_x'])} its time "
            f"for one problem; one branch after another it takes {_x(row['one_after_another']['latency_ratio'])} as "
            "long as that."
        )
        different = [row["label"] for row in timed if not row["one_after_another"]["same_texts"]]
        if different:
            yield f"One after another gave other texts, so its times are of other work, for {', '.join(different)}."
    for name, laws in study["laws"].items():
        if name != "coverage":
            yield _law_sentence(TITLES.get(name, name).partition(" (")[0], laws)
    cover = study["laws"].get("coverage")
    if cover is not None:
        first, last = cover["points"][0], cover["points"][-1]
        yield (
            f"At least one of {last['cost']:g} chains is right for {_percent(last['accuracy'])} of problems, one alone "
            f"for {_percent(first['accuracy'])}: what choosing among chains could gain at most."
        )
    machine = study["machine"]
    if (machine["other_cores"] or 0) > _QUIET * machine["cores"]:
        yield (
            f"Other work took {machine['other_cores']:.1f} of {machine['cores']} cores meanwhile: times are longer "
            "than on a quiet machine, and their ratios noisy."
        )
    cut = [f"{row['label']} ({row['num_cut']})" for row in rows if row["num_cut"]]
    if cut:
        yield f"Searches that a budget or the limit of new tokens cut short: {', '.join(cut)}."


def _comparisons(rest: list[Json]) -> Iterator[str]:
    """Compares rows with the baseline, from which each differs on some problem."""
    if not rest:
        return
    best = max(rest, key=lambda row: row["accuracy"])
    yield (
        f"The most accurate is {best['label']}: {_percent(best['accuracy'])} at {_x(best['tokens_x'])} the tokens, "
        f"{_change(best['over_baseline'])} against the baseline."
    )
    worse = [row["label"] for row in rest if row["over_baseline"]["high"] < 0]
    same = [row["label"] for row in rest if row["over_baseline"]["low"] <= 0 <= row["over_baseline"]["high"]]
    if worse:
        yield f"Below the baseline: {', '.join(worse)}."
    if same:
        yield f"Not to be told from the baseline with so many problems: {', '.join(same)}."
    gains = [row for row in rest if row["efficiency_ratio"] is not None and row["over_baseline"]["low"] > 0]
    if gains:
        efficient = max(gains, key=lambda row: row["efficiency_ratio"])
        yield (
            f"Of those that gain, {efficient['label']} gains most per compute: "
            f"{100 * efficient['efficiency_ratio']:.1f} points per multiple of the baseline's tokens, at "
            f"{_x(efficient['tokens_x'])}."
        )


def _same_verdict(row: Json) -> str:
    """Describes a row that is right and wrong where the baseline is, of which an interval would tell nothing."""
    noun, preposition = ("answer", "to") if row["changed_answers"] == 0 else ("verdict", "on")
    return (
        f"{row['label']} gave the baseline's {noun} {preposition} every problem, at {_x(row['tokens_x'])} the tokens: "
        f"what it generated besides changed no {noun} here."
    )


def _law_sentence(title: str, laws: Json) -> str:
    """Tells which law predicts best, the limit of the power law's error, and the budgets that gained."""
    held_out = laws["held_out"]
    if isinstance(held_out, dict):
        sentence = f"{title}: no law was compared ({held_out['cannot_be_fitted']})"
    else:
        best, *others = held_out
        level = [law["law"] for law in others if law["behind"]["low"] <= 0]
        sentence = f"{title}: left-out budgets are predicted best by the {best['law']} law"
        sentence += f", though not measurably better than by the {' or the '.join(level)} law" if level else ""
        if "power" in (best["law"], *level) and "parameters" in laws["fits"]["power"]:
            sentence += f"; as a power law its error tends to {_limit(laws['fits']['power'])}"
    return sentence + f". {_gains(laws)}".rstrip()


def _limit(power: Json) -> str:
    """Names the limit of a power law's error."""
    ends = power["intervals"]["E_inf"]
    if ends is None:
        return "a value that is not determined (at its bound)"
    low, high = ends
    return f"{_percent(power['parameters']['E_inf'])} (95% CI {_percent(low)} to {_percent(high)})"


def _gains(laws: Json) -> str:
    """Names the budgets that gained measurably on the one before; "" for a single budget."""
    slopes, saturation = laws["slopes"], laws["saturation"]
    if not slopes:
        return ""
    if saturation is not None:
        return f"Beyond {saturation:.3g}x no budget gained measurably on the one before."
    exceptions = [f"from {slope['from']:.3g}x to {slope['to']:.3g}x" for slope in slopes if slope["low"] <= 0]
    sentence = f"Every budget up to {slopes[-1]['to']:.3g}x gained measurably on the one before"
    return sentence + (f", except {', '.join(exceptions)}." if exceptions else ".")


def _setting(study: Json) -> Iterator[str]:
    yield (
        f"{study['model'] or 'A model'} ({study['dtype']}) on {len(study['problems'])} problems of {study['task']}; "
        f"verifier: {study['verifier'] or 'none'}; {study['sampling']}; seed {study['seed']}. Times are of the first "
        f"{study['latency_problems']} problems where they are of one problem alone."
    )


def _table(rows: list[Json]) -> Iterator[str]:
    heads = (
        "strategy", "accuracy (95% CI)", "tokens", "FLOPs", "KV bytes", "energy", "alone", "batched", "one by one",
        "tokens per correct", "efficiency",
    )  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield "|---" + "|--:" * (len(heads) - 1) + "|"
    for row in rows:
        unshared = row["one_after_another"]
        cells = (
            row["label"],
            f"{_percent(row['accuracy'])} ({_ci(row)})",
            _x(row["tokens_x"]),
            _x(row["flops_x"]),
            f"{_x(row['kv_bytes_x'])} / {_x(row['kv_bytes_copied_x'])}",
            _x(row["joules_x"]),
            f"{_seconds(row['latency_s'])} ({_x(row['latency_x'])})",
            _seconds(row["batched_s"]),
            _x(unshared["latency_ratio"] if unshared else None),
            _or(row["cost_per_correct"]["tokens"], "{:.0f}"),
            _or(None if row["efficiency_ratio"] is None else 100 * row["efficiency_ratio"], "{:.2f}"),
        )
        yield f"| {' | '.join(cells)} |"


def _laws(laws: Json) -> Iterator[str]:
    yield "| compute | accuracy (95% CI) |"
    yield "|--:|--:|"
    yield from (f"| {p['cost']:.3g} | {_percent(p['accuracy'])} ({_ci(p)}) |" for p in laws["points"])
    yield ""
    for name, fit in laws["fits"].items():
        if "cannot_be_fitted" in fit:
            yield f"* {name}: {fit['cannot_be_fitted']}"
            continue
        values = ", ".join(_parameter(key, value, fit["intervals"][key]) for key, value in fit["parameters"].items())
        yield f"* {name}: {fit['formula']}; {values}"
    held_out = laws.get("held_out")
    if isinstance(held_out, list):
        values = ", ".join(f"{law['law']} {law['log_likelihood']:.4f}" for law in held_out)
        yield f"* held-out log-likelihood per problem: {values}"
    if laws.get("slopes"):
        values = ", ".join(f"{_interval(slope)} from {slope['from']:.3g}x" for slope in laws["slopes"])
        yield f"* points gained per doubling: {values}"


def _parameter(name: str, value: float, ends: list[float] | None) -> str:
    if ends is None:
        return f"{name} not determined (at its bound, {value:.3g})"
    return f"{name} = {value:.3g} ({ends[0]:.3g} to {ends[1]:.3g})"


def _flat(row: Json) -> Json:
    """Returns a row of the CSV."""
    if row["error"] is not None:
        return {name: row[name] for name in ("key", "label", "strategy", "error")}
    unshared, cost = row["one_after_another"] or {}, row["cost_per_correct"]
    values = {
        **row,
        "accuracy_low": row["accuracy_ci"][0],
        "accuracy_high": row["accuracy_ci"][1],
        "serial_latency_s": unshared.get("latency_s"),
        "serial_latency_ratio": unshared.get("latency_ratio"),
        "serial_per_problem_s": unshared.get("per_problem_s"),
        "serial_tokens_per_s": unshared.get("tokens_per_s"),
        "throughput_ratio": unshared.get("throughput_ratio"),
        **{f"{name}_per_correct": value for name, value in cost.items()},
    }
    return {name: values[name] for name in COLUMNS}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _ci(row: Json) -> str:
    low, high = row["accuracy_ci"]
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _change(gap: Json) -> str:
    return f"{100 * gap['estimate']:+.1f} points (95% CI {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"


def _interval(gap: Json) -> str:
    return f"{100 * gap['estimate']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"


def _x(value: float | None) -> str:
    return _or(value, "{:.3g}x")


def _seconds(value: float | None) -> str:
    return _or(value, "{:.3g} s")


def _or(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
