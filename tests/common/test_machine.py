"""Facts about the machine that cannot be found."""

from treedecode.common import machine


def test_attempt_turns_errors_into_text():
    assert machine.attempt(lambda: 1 / 0) == "failed: ZeroDivisionError: division by zero"
    assert machine.version("no-such-package") == "not installed"
