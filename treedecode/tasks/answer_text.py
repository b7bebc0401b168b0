"""Finds the answer in the text of a solution."""

import re

from treedecode.tasks.numbers import CURRENCY, SIGNED, UNSIGNED, leading_number, plain

# Digits with or without thousands separators, a decimal part or a denominator, a currency or percent sign. A minus
# after an operand subtracts, so the last number of "5-3" is 3.
_LAST = re.compile(rf"(?<![a-zA-Z0-9_.\u00c0-\u024f])(?:(?<![\w)\]}}.])-)?{CURRENCY}?{UNSIGNED}%?")
_WORD = r"[^\W\d_]"
_ANSWER = r"\b(?:final\s+)?answer\W{0,4}(?:\s+(?:is|are|would\s+be|will\s+be|must\s+be)\b|\s*[:=]|\s*\*{1,2}\s*[:=])"
_STATED = re.compile(
    # in Chinese, Japanese and Korean too
    rf"(?:{_ANSWER}|\u7b54\u6848\s*(?:\u662f|\u4e3a|\u70ba|[:\uff1a])|\u7b54\u3048\s*(?:\u306f|[:\uff1a])"
    r"|\ub2f5\s*(?:\uc740|[:\uff1a]))[\s:=*\uff1a]*",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?:[^\n.\u3002\uff0e]|\.(?=\S))*")
_HEDGE = re.compile(
    r"(?:(?:about|approximately|approx\.?|roughly|around|exactly|only|just|simply|equal\s+to|equals|now|therefore|thus|"
    r"clearly|still|indeed|actually|also)\b|\\approx(?![a-zA-Z])|[\u2248=:~])[\s,:]*",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(r"(?:negative|minus)\s+(?=[$\u20ac\u00a3]?[0-9.])", re.IGNORECASE)
_OPTION = re.compile(
    r"(?:option|choice|\()?\s*(?:\\(?:text|textbf|mathrm|mathbf|textrm)\s*\{\s*)?\(?\s*([A-J])\s*"
    r"(?:\)\s*\}|\}\s*\)|[).:}]|(?=[,;!?]|\s*$))"
)
_PREFIX = re.compile(rf"{_ANSWER}[\s:=*]*|answer\s*", re.IGNORECASE)
# What makes an expression of a number, so that the number alone is not the answer.
_OPERATOR = re.compile(
    r"\s*(?:[-+*/^=<>_|({\[:\u00b7\u00d7\u00f7\u00b1\u221a](?!\s+[a-zA-Z]{2,})|\\(?!text|mbox|mathrm|textbf|circ|\)|\])"
    r"|,\s*[-0-9(\\]|(?:[a-zA-Z]+\s+)?(?:or|and)\s+[-0-9(\\]"
    r"|[a-zA-Z](?![a-zA-Z])(?!\s*[.,;]?\s*$)(?!\s+[a-zA-Z]))"
)
# Where the answer of a sentence ends.
_REST = re.compile(
    r";\s|\u3002|\\\)|\\\]|\s\(|,?\s+(?:because|since|which|as|where|who|so\s+that|i\.e\.)\b"
    r"|,\s+(?:the|an?|so|and\s+so|that\s+is)\b"
)
_NUMBERED = re.compile(
    r"(?:[0-9]+|[ivxIVX]+)[.)]\s+\D|(?:step|part|day|case|section|method|example|problem|question)\b", re.IGNORECASE
)
_MARKERS = ("<|", "</s>", "<s>", "[INST]", "[/INST]", "<end_of_turn>", "<start_of_turn>", "<eos>", "\x00")
_NEXT = re.compile(
    r"(?:^|\n)[ \t]*(?:[*#]+[ \t]*)?(?:Q|Question|Problem|Human|User|Instruction|Exercise|Input|Task)"
    r"(?:[ \t]*#?[0-9]+)?[ \t]*(?:\*\*)?[:\uff1a]"
)
_THINK = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)


def after_hashes(text: str) -> str | None:
    """Returns the rest of the line after the last `####`, as GSM8K marks an answer (2110.14168); None without one."""
    marked = re.findall(r"####[ \t]*([^\n]*)", text)
    return next((line.strip() for line in reversed(marked) if line.strip()), None)


def boxed(text: str) -> str | None:
    r"""Returns the content of the last complete `\boxed{}` or `\fbox{}`, as MATH marks an answer (2103.03874)."""
    position = _last_box(text)
    return None if position is None else text[slice(*position)].strip()


def _last_box(text: str) -> tuple[int, int] | None:
    """Returns begin and end of the content of the last box that is complete and not blank; takes linear time."""
    boxes = {}  # the end of each box' command, and its begin
    for match in re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z]) *", text):
        boxes[match.end()] = match.start()
    last: tuple[int, int] | None = None
    open_braces: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            begin = open_braces.pop()
            is_later = last is None or begin > last[0]
            if begin in boxes and is_later and text[begin + 1 : match.start()].strip():
                last = begin + 1, match.start()
    for begin in reversed(boxes):
        if last is not None and begin < last[0]:
            break
        if begin < len(text) and text[begin] != "{":  # \boxed 5
            word = re.compile(r"[^\s$]*").match(text, begin)
            assert word is not None
            if word[0]:
                return word.span()
    return last


def stated(text: str) -> str | None:
    """Returns the rest of the sentence after the last "the answer is" of a chain of thought (2201.11903), else None.

    Of a number with words behind it ("5 apples") it returns the number.
    """
    position = _last_statement(text)
    if position is None:
        return None
    phrase = text[slice(*position)].strip().strip("*").strip()
    counted = re.match(rf"({SIGNED})\s+{_WORD}", plain(phrase))
    return (counted[1] if counted else phrase) or None


def _last_statement(text: str) -> tuple[int, int] | None:
    """Returns begin and end of the last statement of an answer that says something."""
    for match in reversed(list(_STATED.finditer(text))):
        sentence = _SENTENCE.match(text, match.end())
        assert sentence is not None
        if sentence[0].strip(" *_"):
            return sentence.span()
    return None


def last_number(text: str) -> str | None:
    """Returns the last number of a text as it is written, with sign, separators and `$` or `%`; None without one."""
    number = None
    for match in _LAST.finditer(plain(text)):
        number = match[0]
    return number


def is_heading(marked: str) -> bool:
    """Returns whether the text after `####` reads like a Markdown heading ("Step 2: add them up"), not an answer."""
    text = marked.strip().strip("*").strip()
    if (prefix := _PREFIX.match(text)) is not None:
        return prefix.end() == len(text)
    if _option(text) is not None:
        return False
    text = _NEGATIVE.sub("-", _HEDGE.sub("", text, count=1), count=1)
    if text.endswith(":") or _NUMBERED.match(text):
        return True
    return leading_number(plain(text)) is None and len(re.findall(rf"{_WORD}{{2,}}", re.sub(r"\\\w+", "", text))) > 0


def extract_answer(text: str) -> str | None:
    r"""Returns the answer of a solution's text, or None.

    Only what comes after the thoughts of a reasoning model (`<think>`) counts, and only what comes before it goes on
    with another question. There the answer is the last that is marked with `####`, else in `\boxed{}`, else stated,
    else the last number. A statement in the last line, after the line of the box, is taken before it. Headings that
    use `####` are no marks. Units and words around a number are left out of what is marked or stated.
    """
    text = without_thoughts(text)
    head = before_next_question(text)
    answer = _extract(head)
    return answer if answer is not None or len(head) == len(text) else _extract(text)


def _extract(text: str) -> str | None:
    marks = [line.strip() for line in re.findall(r"####[ \t]*([^\n]*)", text) if line.strip()]
    answers = [mark for mark in marks if not is_heading(mark)]
    if answers:
        return reduced(answers[-1])
    box, statement = _last_box(text), _last_statement(text)
    if statement is not None:
        phrase = text[slice(*statement)].strip().rstrip("!")
        is_last_line = (
            box is not None and "\n" in text[box[1] : statement[0]] and "\n" not in text[statement[1] :].strip()
        )
        if box is None or (is_last_line and _is_definite(phrase)):
            return reduced(phrase)
    if box is not None:
        return _of_box(text[slice(*box)])
    names = [mark for mark in marks if not _NUMBERED.match(mark) and not mark.endswith(":") and not _PREFIX.match(mark)]
    return names[-1] if names else last_number(text)


def _of_box(content: str) -> str:
    """Returns the answer of a box: its content, unless that is an option or a sentence."""
    option = _option(content.strip())
    if option is not None:
        return option
    inner = re.fullmatch(r"\s*\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}\s*", content)
    if inner is not None and _STATED.search(inner[1]):
        return reduced(inner[1])
    return content.strip()


def _is_definite(phrase: str) -> bool:
    """Returns whether a statement names a number, an option or an expression, and not only words."""
    text = reduced(phrase)
    return leading_number(plain(text)) is not None or _option(text) is not None or "\\" in text


def reduced(phrase: str) -> str:
    """Reduces a statement to the answer: without emphasis, hedges, and words behind a number or an option."""
    if (box := boxed(phrase)) is not None:
        return _of_box(box)
    text = phrase.strip()
    if said := list(_STATED.finditer(text)):
        text = text[said[-1].end() :]
    text = re.sub(r"\*\*|__|`", "", text).strip()
    if text.startswith("$") and (end := text.find("$", 1)) > 0 and not re.match(r"\s*[0-9]", text[end + 1 :]):
        math = re.match(r"\$\$?([^$]+)\$\$?", text)  # the first formula, unless these are two prices
        if math is not None:
            text = math[1].strip() + text[math.end() :]
    text = re.sub(r"^\\[(\[]\s*", "", text)
    while hedge := _HEDGE.match(text):
        text = text[hedge.end() :]
    text = _NEGATIVE.sub("-", text, count=1) if _NEGATIVE.match(text) else text
    if (option := _option(text)) is not None:
        return option
    ascii_text = plain(text)
    number = leading_number(ascii_text)
    if number is not None:
        if ascii_text[: len(number)].endswith("$") and ascii_text[len(number) :][:1].isdigit():
            return text
        rest = ascii_text[len(number) :]
        if not _OPERATOR.match(rest) or re.match(r"\s*\(\s*[^()]*[^\W\d_]{2,}[^()]*\)", rest):
            return re.sub(r"(?<=\d)\s*\$$", "", number.strip()) or number
    text = _REST.split(text, maxsplit=1)[0]
    return text.strip().rstrip("$").strip() or phrase.strip()


def _option(text: str) -> str | None:
    r"""Returns the letter of a choice that a text begins with: "(B)", "B) 42", "B: 42", `\textbf{(B)}\ 42` or "B"."""
    match = _OPTION.match(re.sub(r"\*\*|^\$+\s*", "", text.strip()))
    return match[1] if match else None


def without_thoughts(text: str) -> str:
    """Returns what follows the last thoughts of a reasoning model; thoughts without an end hide what follows them."""
    begin, depth = 0, 0
    cut = len(text)
    for match in _THINK.finditer(text):
        if match[1]:
            begin, depth, cut = match.end(), 0, len(text)
        elif depth == 0:
            depth, cut = 1, match.start()
    return text[begin:cut]


def before_next_question(text: str) -> str:
    """Returns a text up to where the model goes on with another question or another turn of a chat."""
    end = len(text)
    for marker in _MARKERS:
        position = text.find(marker, 0, end)
        while position >= 0 and not text[:position].strip():
            position = text.find(marker, position + 1, end)
        end = position if position >= 0 else end
    for match in _NEXT.finditer(text, 0, end):
        if text[: match.start()].strip():
            return text[: match.start()]
    return text[:end]
