"""Text for counts, numbers, byte sizes, times, durations and settings. A dash stands for None."""

import datetime
from collections.abc import Iterator
from typing import Any

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_NONE = "–"
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_DAYS_FROM = 2 * _DAY
"""Seconds from which a duration is in days."""


def format_count(value: float | None, noun: str = "", plural: str = "") -> str:
    """A whole number with a comma after each thousand, and its noun in the right form: "1,234 rows"."""
    if value is None:
        return _NONE
    words = noun if value == 1 else plural or f"{noun}s"
    return f"{value:,.0f} {words}" if noun else f"{value:,.0f}"


def format_number(value: float | None, digits: int | None = None) -> str:
    """A number with `digits` decimals; without `digits`, three significant digits, or all digits before the point."""
    if value is None:
        return _NONE
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_share(part: float, whole: float, digits: int = 1) -> str:
    """A percentage from 0 to 100, rounded to the nearest: it is 100 only if nothing is missing.

    Nothing of nothing is 100 %.
    """
    share = 100 * min(max(part, 0), whole) / whole if whole > 0 else 100.0
    if part < whole:
        share = min(share, 100 - 10 ** -digits)
    return f"{share:.{digits}f}%"


def format_time(seconds: float | None) -> str:
    """A Unix time to the minute, in UTC: "2026-11-26 18:23 UTC". A dash for a year that no clock shows."""
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC) if seconds is not None else None
    except (OverflowError, ValueError, OSError):
        moment = None
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else _NONE


def format_bytes(value: float | None) -> str:
    """A byte size in decimal units: "1.5 MB" is 1,500,000 bytes."""
    if value is None:
        return _NONE
    for unit in _BYTE_UNITS:
        if abs(value) < 999.5 or unit == _BYTE_UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 99.5 else f"{value:.1f} {unit}"


def format_duration(seconds: float | None) -> str:
    """A duration in its two largest units: "0.056 s", "4.2 s", "12 s", "1 min 05 s", "1 h 05 min", "3 days 4 h"."""
    if seconds is None:
        return _NONE
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    if whole < _DAYS_FROM:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} min"
    return f"{whole // _DAY:,} days {whole % _DAY // _HOUR} h"


def format_hours(seconds: float) -> str:
    """A duration as a bare number of hours, for columns of (worker) hours."""
    hours = seconds / _HOUR
    if 0 < hours < 0.0001:
        return "<0.0001"
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def flat_settings(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names with their values as text."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flat_settings(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(map(str, value)) or "none"
    else:
        yield prefix, _NONE if value in (None, "") else str(value)
