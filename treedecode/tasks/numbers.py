"""Reads numbers as texts write them: digits of any script, separators, fractions, mixed numbers, signs."""

import re
import unicodedata
from fractions import Fraction

_MINUS = dict.fromkeys(map(ord, "\u2212\u2013\u2012\ufe63\uff0d\u2010\u2011"), "-")
_SPACES = dict.fromkeys(map(ord, "\u2009\u202f\u00a0\u2007\u2008\u200a"), " ")
_SEPARATORS = {0x066B: ".", 0x066C: ",", 0xFF0C: ",", 0xFF0E: ".", 0xFF05: "%", 0x066A: "%", 0xFF04: "$", 0xFF0F: "/"}
_LATEX = (
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[!,;: ]|\\(?:quad|qquad)(?![a-zA-Z])"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\([$%&#])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
)
_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9])"  # 1,000,000 or 10,00,000
_SPACED = r"[0-9]{1,3}(?:[ '][0-9]{3})+(?![0-9])"
_EUROPEAN = r"[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]+(?![0-9.,])|[0-9]{1,3}(?:\.[0-9]{3}){2,}(?![0-9.,])"
DECIMAL = rf"(?:{_EUROPEAN}|(?:{_GROUPED}|{_SPACED}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_RATIO = rf"{DECIMAL}\s*/\s*[0-9]+(?![0-9/])"
_FRAC = r"\\frac\s*(?:\{\s*[0-9]+\s*\}|[0-9])\s*(?:\{\s*[0-9]+\s*\}|[0-9])"
_MIXED = rf"[0-9]+(?:\s+[0-9]+/[0-9]+(?![0-9/])|\s*{_FRAC})"
_POWER = r"\s*(?:\\times|\\cdot|[x\u00d7*])\s*10\s*\^\s*(?:\{\s*-?[0-9]+\s*\}|-?[0-9]+)|[eE][-+]?[0-9]+(?![0-9a-zA-Z])"
UNSIGNED = rf"(?:{_MIXED}|{_FRAC}|{_RATIO}|{DECIMAL}(?:{_POWER})?)"
CURRENCY = "[$\u20ac\u00a3\u00a5\u20b9]"
SIGNED = rf"(?:[-+]\s*)?(?:{CURRENCY}\s*)?(?:[-+]\s*)?{UNSIGNED}(?:\s*(?:%|{CURRENCY}))?"
_NUMBER = re.compile(SIGNED)
_PARTS = re.compile(rf"(?P<sign>[-+]?)\s*{CURRENCY}?\s*(?P<sign2>[-+]?)\s*(?P<number>{UNSIGNED})\s*(?:%|{CURRENCY})?")
_MAX_EXPONENT = 1000


def plain(text: str) -> str:
    """Writes digits of any script, minus signs, separators and spaces of LaTeX and typography in ASCII."""
    text = ascii_digits(text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def ascii_digits(text: str) -> str:
    """Writes digits of any script, minus signs, separators and typographic spaces in ASCII."""
    if text.isascii():
        return text
    return "".join(map(_digit, text.translate(_MINUS | _SPACES | _SEPARATORS)))


def _digit(character: str) -> str:
    value = unicodedata.decimal(character, None) if not character.isascii() else None
    return character if value is None else str(value)


def leading_number(text: str) -> str | None:
    """Returns the number that a text in plain form begins with, as it is written; None if it begins otherwise."""
    match = _NUMBER.match(text)
    return match[0] if match else None


def value_of(text: str) -> Fraction | None:
    """Returns the exact value of a text in plain form that is one number; None for any other text.

    A currency or percent sign is a unit here: "50%" is 50. "1,234.5", "1.234,5", "1 234.5" and "12,34,567" are read as
    such numbers are written, "1.234" as a decimal.
    """
    match = _PARTS.fullmatch(text.strip())
    if match is None or (match["sign"] and match["sign2"]):
        return None
    value = _unsigned(match["number"])
    return None if value is None else -value if "-" in match["sign"] + match["sign2"] else value


def _unsigned(text: str) -> Fraction | None:
    if mixed := re.fullmatch(rf"([0-9]+)\s*(?:\s([0-9]+/[0-9]+)|({_FRAC}))", text):
        part = _unsigned(mixed[2] or mixed[3])
        return None if part is None else int(mixed[1]) + part
    if re.fullmatch(_FRAC, text):
        over, under = re.findall(r"\{\s*([0-9]+)\s*\}|([0-9])", text[len(r"\frac") :])
        return _ratio(Fraction(over[0] or over[1]), int(under[0] or under[1]))
    if "/" in text:
        over_text, _, under_text = text.partition("/")
        over_value = _decimal(over_text.strip())
        return None if over_value is None else _ratio(over_value, int(under_text))
    power = re.search(_POWER, text)
    value = _decimal(text[: power.start()] if power else text)
    if value is None or power is None:
        return value
    exponent = int(re.sub(r"[{}\s]", "", re.split(r"\^|[eE]", power[0])[-1]))
    return value * Fraction(10) ** exponent if abs(exponent) <= _MAX_EXPONENT else None


def _ratio(over: Fraction, under: int) -> Fraction | None:
    return over / under if under else None


def _decimal(text: str) -> Fraction | None:
    if re.fullmatch(_EUROPEAN, text):
        text = text.replace(".", "").replace(",", ".")
    return Fraction(re.sub(r"[, ']", "", text))
