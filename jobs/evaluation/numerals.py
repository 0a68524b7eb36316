"""Numbers as the report prints them: `.475`, `+.047 [.020, .074]`, `p < .001`, `48.6 KB`."""

from __future__ import annotations

MINUS = "\N{MINUS SIGN}"


def value(number: float) -> str:
    """Return a metric with three places and no leading zero: .475, 1.000, -.011 with a minus."""
    text = f"{abs(number):.3f}"
    short = text[1:] if text.startswith("0") else text
    return MINUS + short if number < 0 and short != ".000" else short


def signed(number: float) -> str:
    """Return a difference with its sign: +.047; one that rounds to nothing has none: .000."""
    text = value(number)
    return text if text.startswith(MINUS) or text == ".000" else "+" + text


def interval(low: float, high: float) -> str:
    """Return an interval: [.020, .074]."""
    return f"[{value(low)}, {value(high)}]"


def p_value(p: float) -> str:
    """Return what follows the letter p: `= .002`, `< .001`."""
    return "< .001" if p < 0.001 else f"= {value(p)}"


def count(number: float) -> str:
    """Return a whole number with separators: 12,345."""
    return f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """Return bytes in decimal units, as object stores bill them: 320 B, 48.6 KB, 1.2 MB."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 999.5:
            places = 0 if unit == "B" or num_bytes >= 99.95 else 1
            return f"{num_bytes:.{places}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def milliseconds(ms: float) -> str:
    """Return a duration in milliseconds without the unit: 8.4, 97, 1,990."""
    return f"{ms:.1f}" if ms < 9.95 else f"{ms:,.0f}"
