import contextlib
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treedecode.accounting.budget import Budget
from treedecode.cli.settings import describe, parse, shown_type
from treedecode.engine.sampling import Sampling
from treedecode.strategies import STRATEGIES, TreeOfThoughts


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    name: str = "x"


@dataclass(frozen=True)
class Base:
    """A base.

    Args:
        low, high: where it begins and ends.
        count: is said by the other.
    """

    low: float = 0.5


@dataclass(frozen=True)
class Outer(Base):
    """Sums it up,
    in a line or two.

    More of it.

    Args:
        count: how many
            there are.
        word: what is said.
    """

    count: int = 3
    word: str = "Wait, what"
    share: float | None = None
    loud: bool = False
    order: Literal["bfs", "dfs"] = "bfs"
    limit: int | str = 0
    inner: Inner | None = None
    ends: tuple[str, ...] = ()
    kept: Any = field(default=None, init=False)

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count: expected >= 0, got {self.count}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Outer()),
        ("count=5", Outer(count=5)),
        ("count = -0 , share=1e-3", Outer(count=0, share=0.001)),
        ("share=2", Outer(share=2.0)),
        ("share=none,loud=True", Outer(loud=True)),
        ("word=Hm", Outer(word="Hm")),
        ('word="a, \\"b\\"\\n= c",count=1', Outer(word='a, "b"\n= c', count=1)),
        ("word=", Outer(word="")),
        ("word=none", Outer(word="none")),
        ("order=dfs", Outer(order="dfs")),
        ("limit=7", Outer(limit=7)),
        ("limit=many", Outer(limit="many")),
        ('limit="7"', Outer(limit="7")),
        ("inner.rate=0.5,count=2,inner.name=y", Outer(inner=Inner(0.5, "y"), count=2)),
        ("inner=none", Outer()),
        ('ends=["a,]", "\\n"],count=1', Outer(ends=("a,]", "\n"), count=1)),
        ("ends=[]", Outer()),
    ],
)
def test_values_are_read_by_their_types(text, expected):
    assert parse(Outer, text, "outer") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont=5", "outer: has no setting 'cuont'; it has count, ends, inner, limit, loud, low, order, share, word"),
        ("kept=5", "outer: has no setting 'kept'"),
        ("count.rate=5", "outer: has no setting 'count.rate'"),
        ("inner.speed=5", "outer: inner: has no setting 'speed'; it has name, rate"),
        ("count=2.5", "outer: count: expected an int, got '2.5'"),
        ("count=none", "outer: count: expected an int, got 'none'"),
        ("share=x", "outer: share: expected a number or none, got 'x'"),
        ("loud=1", "outer: loud: expected true or false, got '1'"),
        ("order=best", "outer: order: expected bfs or dfs, got 'best'"),
        ('count="2"', "outer: count: expected an int, got '\"2\"'"),
        ('word="\\x"', "outer: word: .* is not a JSON string"),
        ("inner=2", "outer: inner: expected .rate, .name or none, got '2'"),
        ("inner=none,inner.rate=2", "outer: inner is set as a whole and in parts"),
        ("ends=a", r"outer: ends: expected \["),
        ('ends=["a" "b"]', "is not a JSON list of strings"),
        ("count=1,count=2", "outer: count is set twice"),
        ("count", "outer: expected name=value, separated by commas, got 'count'"),
        ('word="open', "outer: expected name=value, separated by commas, got 'word=\"open'"),
        ("count=-1", "outer: count: expected >= 0, got -1"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(Outer, text, "outer")


@settings(deadline=None)
@given(st.text())
def test_any_text_either_parses_or_is_refused(text):
    with contextlib.suppress(ValueError):
        assert isinstance(parse(Outer, text, "outer"), Outer)


def test_the_settings_of_the_package_itself():
    assert parse(Budget, "tokens=1e5,seconds=60", "budget") == Budget(tokens=1e5, seconds=60)
    with pytest.raises(ValueError, match="budget: has no setting 'per_problem'; it has flops, joules, kv_bytes"):
        parse(Budget, "per_problem=3", "budget", per_problem=None)
    assert parse(Budget, "tokens=5", "budget", per_problem=Budget(tokens=2)).per_problem == Budget(tokens=2)
    expected = TreeOfThoughts(depth=2, dead=0.1, sampling=Sampling(temperature=0.5))
    assert parse(TreeOfThoughts, "depth=2,dead=0.1,sampling.temperature=0.5", "strategy") == expected
    for strategy in STRATEGIES.values():
        needs = [field.name for field in fields(strategy) if field.default is MISSING]
        if needs:
            with pytest.raises(
                ValueError, match=f"strategy: expected {'=... and '.join(needs)}=..., which has no default"
            ):
                parse(strategy, "", "strategy")
        else:
            assert parse(strategy, "", "strategy") == strategy()


def test_descriptions_have_all_settings_and_read_back():
    lines = list(describe(Outer))
    assert lines[0] == "  Sums it up, in a line or two."
    assert "    count=3  how many there are." in lines
    assert '    word="Wait, what"  what is said.' in lines
    assert "    share=none" in lines
    assert "    low=0.5  where it begins and ends." in lines
    assert "    ends=[]" in lines
    assert "    inner.{rate,name}" in lines
    assert not any("kept" in line for line in lines)
    written = ",".join(line.split("  ")[2] for line in lines[1:] if "{" not in line)
    assert parse(Outer, written, "outer") == Outer()
    assert shown_type(float | None) == "a number or none"
