"""The process of `math_process`: compares the two expressions of each line of its input by `math-verify`."""

import json
import logging
import re
import sys
from typing import Any

_SQRT = re.compile(r"\\?sqrt\s*\(([^()]*)\)")
_DECIMAL = re.compile(r"(?<![0-9.,])([0-9]*)\.([0-9]+)(?![0-9.,])")
_DIGITS = 50  # numbers that agree in so many are equal


def _as_fraction(match: re.Match[str]) -> str:
    """Writes a decimal as the fraction that it is; sympy would round it."""
    return rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}"


def parsed(text: str) -> list[Any]:
    """Parses an expression; [] if it is none, or if the parser passes over a part of it."""
    from math_verify import parse
    from sympy import Expr, Symbol, simplify

    def read(text: str) -> list[Any]:
        results: list[Any] = parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=None)
        return results

    text = _DECIMAL.sub(_as_fraction, _SQRT.sub(r"\\sqrt{\1}", text))
    results = read(text)
    if results and isinstance(results[0], Expr) and "=" not in text:
        # The parser recovers from errors by leaving something out. It shows when the expression is a part of another.
        xi = Symbol("xi", real=True)
        for longer in read(rf"\left({text}\right)+\xi")[:1]:
            symbols = [symbol for symbol in getattr(longer, "free_symbols", ()) if symbol.name.lstrip("\\") == "xi"]
            if len(symbols) == 1 and simplify(longer.subs(symbols[0], xi) - results[0] - xi) == 0:
                return results
        return []
    return results


def are_equal(a: str, b: str) -> bool:
    """Returns whether math-verify takes either for the other, and numbers agree in 50 digits."""
    from math_verify import verify
    from sympy import Expr

    first, second = parsed(a), parsed(b)
    if not first or not second:
        return False
    x, y = first[0], second[0]
    if isinstance(x, Expr) and isinstance(y, Expr) and x.is_number and y.is_number:
        difference = (x - y).evalf(_DIGITS)
        return bool(abs(difference) <= 10.0**-40 * max(1e-300, abs(x.evalf(_DIGITS)))) or bool(x.equals(y))
    # math-verify takes "x = 5" for 5 where the reference is 5, and an interval for an inequality, but not the reverse.
    return any(verify(gold, given, timeout_seconds=None) for gold, given in ((first, second), (second, first)))


def main() -> None:
    """Answers "1" or "0" for each line, a JSON list of two expressions."""
    import math_verify  # noqa: F401  (takes seconds)

    logging.disable(logging.CRITICAL)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            result = are_equal(*json.loads(line))
        except Exception:  # sympy raises errors of all kinds on expressions that it cannot evaluate
            result = False
        print(int(result), flush=True)


if __name__ == "__main__":
    main()
