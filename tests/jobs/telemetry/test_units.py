"""Counts, numbers, sizes and durations as text."""

import re

import pytest

from jobs.telemetry.units import (
    format_bytes,
    format_count,
    format_duration,
    format_hours,
    format_number,
    format_share,
)

_SECONDS = {"s": 1, "min": 60, "h": 3600, "days": 86400}


def test_sizes_are_in_decimal_units() -> None:
    assert [format_bytes(value) for value in (None, 0, 999, 1000, 99_960, 123_456_789, 5e12, 6e15)] == [
        "–", "0 B", "999 B", "1.0 kB", "100 kB", "123 MB", "5.0 TB", "6.0 PB"]


@pytest.mark.parametrize("value", [7 ** power for power in range(20)])
def test_a_size_is_within_five_percent_and_has_at_most_three_digits(value: int) -> None:
    number, unit = format_bytes(value).split()
    powers = {"B": 0, "kB": 1, "MB": 2, "GB": 3, "TB": 4, "PB": 5}
    assert float(number) * 1000 ** powers[unit] == pytest.approx(value, rel=0.05)
    assert len(number.replace(".", "")) <= 3 or unit == "PB"
    assert format_bytes(-value) == f"-{number} {unit}"


def test_counts_have_commas_and_the_right_form_of_the_noun() -> None:
    assert [format_count(value) for value in (None, 0, 1234, 1_234_567)] == ["–", "0", "1,234", "1,234,567"]
    assert [format_count(value, "image") for value in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert format_count(1, "process", "processes") == "1 process"
    assert format_count(2, "process", "processes") == "2 processes"


def test_numbers_have_three_digits_or_the_requested_decimals() -> None:
    assert [format_number(value) for value in (None, 0, 0.012345, 1.5, 99.96, 1234.5)] == [
        "–", "0", "0.0123", "1.5", "100", "1,234"]
    assert format_number(1234.5678, 2) == "1,234.57" and format_number(2.0, 0) == "2" and format_number(None, 2) == "–"


def test_durations_have_the_two_largest_units() -> None:
    assert [format_duration(value) for value in (
        None, 0, 0.056, 0.999, 4.24, 9, 9.96, 59.4, 59.6, 65, 3599.7, 3900, 172_799, 172_800, 99_999_999)] == [
        "–", "0 s", "0.056 s", "1 s", "4.2 s", "9 s", "10 s", "59 s", "1 min 00 s", "1 min 05 s", "1 h 00 min",
        "1 h 05 min", "47 h 59 min", "2 days 0 h", "1,157 days 9 h"]


@pytest.mark.parametrize("value", [0.013 * 3 ** power for power in range(20)])
def test_a_duration_is_right_to_its_last_unit(value: float) -> None:
    parts = re.findall(r"([\d.,e-]+) (\w+)", format_duration(value))
    assert 1 <= len(parts) <= 2
    seconds = sum(float(number.replace(",", "")) * _SECONDS[unit] for number, unit in parts)
    assert seconds == pytest.approx(value, abs=max(_SECONDS[parts[-1][1]] if value > 10 else 0, 0.051 * value))


def test_hours_are_bare_numbers() -> None:
    assert [format_hours(value) for value in (0, 0.1, 1.8, 36, 3600, 36_000 - 36, 36_000, 3.6e7)] == [
        "0", "<0.0001", "0.0005", "0.01", "1", "10", "10", "10,000"]


def test_shares_are_from_0_to_100_and_100_only_if_nothing_is_missing() -> None:
    pairs = ((1, 3), (0, 5), (5, 5), (99_999, 100_000), (302, 303), (0, 0))
    assert [format_share(*pair) for pair in pairs] == ["33.3%", "0.0%", "100.0%", "99.9%", "99.7%", "100.0%"]
    assert [format_share(part, whole, 0) for part, whole in ((-1, 10), (11, 10), (1, 0), (199, 200))] == [
        "0%", "100%", "100%", "99%"]
