"""A calculator for models: exact arithmetic on what they write, by a small parser that knows numbers and operators alone.

    sum = product (("+" | "-") product)*        product = signed (("*" | "/" | "%") signed)*
    signed = ("+" | "-") signed | power         power = atom ("**" | "^" signed)?        atom = number | "(" sum ")"
"""

import re
from fractions import Fraction

LONGEST, DEEPEST = 200, 30  # characters, and brackets and signs inside each other
MOST_BITS = 512  # of a number on the way: about 154 digits
TOKEN = re.compile(r"\s*(\d[\d,]*(?:\.\d+)?|\.\d+|\*\*|[-+*/%^()])", re.ASCII)
SAME = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", ":": "/"})


class CalculatorError(Exception):
    """Why there is no result."""


def calculate(text: str) -> str:
    """Returns the value of an expression: "7", "-0.5", or ten significant digits of what does not end.

    Raises CalculatorError for what is no arithmetic, is too long, or has too large a value on the way. Work is bounded by the
    length of the text.
    """
    if len(text) > LONGEST:
        raise CalculatorError(f"longer than {LONGEST} characters")
    value, left = _sum(_tokens(text.translate(SAME)), 0)
    if left:
        raise CalculatorError(f"unexpected {left[0]!r}")
    return shown(value)


def shown(value: Fraction) -> str:
    """Returns a number as people write it."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.10g}"


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    while text[at:].strip():
        token = TOKEN.match(text, at)
        if token is None:
            raise CalculatorError(f"unexpected {text[at:].lstrip()[0]!r}")
        found.append(token[1])
        at = token.end()
    return found


def _sum(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    """Returns the value at the front of the tokens, and the tokens after it; as do those below."""
    value, tokens = _product(tokens, depth)
    while tokens and tokens[0] in "+-":
        sign = tokens[0]
        right, tokens = _product(tokens[1:], depth)
        value = _bounded(value + right if sign == "+" else value - right)
    return value, tokens


def _product(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    value, tokens = _signed(tokens, depth)
    while tokens and tokens[0] in ("*", "/", "%"):
        sign = tokens[0]
        right, tokens = _signed(tokens[1:], depth)
        if sign != "*" and right == 0:
            raise CalculatorError("division by zero")
        value = _bounded(value * right if sign == "*" else value / right if sign == "/" else value % right)
    return value, tokens


def _signed(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    if depth > DEEPEST:
        raise CalculatorError(f"more than {DEEPEST} brackets and signs inside each other")
    if tokens and tokens[0] in "+-":
        value, left = _signed(tokens[1:], depth + 1)
        return (value if tokens[0] == "+" else -value), left
    return _power(tokens, depth)


def _power(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    value, tokens = _atom(tokens, depth)
    if not tokens or tokens[0] not in ("**", "^"):
        return value, tokens
    power, tokens = _signed(tokens[1:], depth + 1)
    if power.denominator != 1:
        raise CalculatorError("a power that is no whole number")
    if value == 0 and power < 0:
        raise CalculatorError("division by zero")
    # Before it is computed: 9**9**9 has hundreds of millions of digits.
    if abs(power) * max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise CalculatorError("too large")
    return value**power.numerator, tokens


def _atom(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    if not tokens:
        raise CalculatorError("it ends early")
    if tokens[0] == "(":
        value, left = _sum(tokens[1:], depth + 1)
        if not left or left[0] != ")":
            raise CalculatorError("a bracket is not closed")
        return value, left[1:]
    if not tokens[0][-1].isdigit() and not tokens[0][0].isdigit():
        raise CalculatorError(f"unexpected {tokens[0]!r}")
    return _bounded(Fraction(tokens[0].replace(",", ""))), tokens[1:]


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise CalculatorError("too large")
    return value
