"""Numbers as a person reads them: three or four digits and a unit."""

from __future__ import annotations

GIB = 1024**3
_NAMES = ((1e15, " quadrillion"), (1e12, " trillion"), (1e9, " billion"), (1e6, " million"))
_SHORT = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SPANS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "s"), (1e-3, "ms"))


def digits(value: float, wanted: int = 3) -> str:
    """A number above 0 with so many significant digits, thousands apart and never in powers of ten."""
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 1
    return f"{value:,.{max(0, wanted - whole)}f}"


def in_words(value: float) -> str:
    """``405,853,388,800`` as ``405.9 billion``; below a million every digit."""
    for factor, name in _NAMES:
        if value >= factor:
            return f"{digits(value / factor, 4)}{name}"
    return f"{value:,.0f}" if value == int(value) else digits(value)


def short(value: float, unit: str = "") -> str:
    """With an SI prefix, such as ``1.23 M``."""
    for factor, prefix in _SHORT:
        if abs(value) >= factor:
            return f"{digits(value / factor)} {prefix}{unit}"
    return f"{digits(value)} {unit}".strip()


def gib(num_bytes: float) -> str:
    """Bytes in GiB, without the unit: for columns."""
    value = num_bytes / GIB
    return f"{value:,.1f}" if value >= 100 else f"{value:.2f}"


def mib(num_bytes: float) -> str:
    """Bytes in MiB, without the unit: for columns."""
    return digits(num_bytes / 2**20)


def span(seconds: float) -> str:
    """A time in the unit that suits it."""
    for factor, name in _SPANS:
        if seconds >= (2 if name == "days" else 1) * factor:
            return f"{digits(seconds / factor)} {name}"
    return f"{digits(seconds / 1e-3)} ms"


def percent(part: float) -> str:
    """A part of one."""
    return f"{100 * part:.1f} %"


def money(dollars: float) -> str:
    """US dollars."""
    return f"{in_words(dollars)} US dollars" if dollars >= 1e6 else f"{dollars:,.0f} US dollars"
