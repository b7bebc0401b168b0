"""Environment variables with values that are not allowed."""

import pytest

from treedecode.common import env


@pytest.mark.parametrize(
    ("variable", "function"), [("TREEDECODE_CPU_ISA", "cpu_isa"), ("TREEDECODE_BACKEND", "backend")]
)
def test_bad_variables_are_named(monkeypatch, variable, function):
    monkeypatch.setenv(variable, "sse9")
    with pytest.raises(ValueError, match=f"{variable}: expected .*, got 'sse9'"):
        getattr(env, function)()
