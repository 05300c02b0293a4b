import hashlib
import itertools
import time

import numpy as np
import pytest

from pipeline.media import duplicates


def first_near_rows(phash, colour, bits, distance, missing=None):
    """The rules of the docstring as a plain loop."""
    kept, result = [], []
    for row, (value, mean) in enumerate(zip(phash.tolist(), colour.astype(int), strict=True)):
        hits = [] if missing is not None and missing[row] else [
            other for other in kept if (value ^ int(phash[other])).bit_count() <= bits
            and np.abs(mean - colour[other]).max() <= distance]
        result.append(hits[0] if hits else row)
        if not hits and not (missing is not None and missing[row]):
            kept.append(row)
    return result


def check_find_near(phash, colour, bits=3, distance=12, missing=None):
    phash, colour = np.asarray(phash, np.uint64), np.asarray(colour, np.uint8)
    first_rows = duplicates.find_near(phash, colour, bits, distance, missing)
    assert first_rows.dtype == np.int64
    assert first_rows.tolist() == first_near_rows(phash, colour, bits, distance, missing)
    return first_rows


def flip_bits(rng, values, most):
    """Each value with up to `most` bits changed."""
    values = np.array(values, np.uint64)
    for _ in range(most):
        values ^= np.where(rng.random(len(values)) < 0.7, np.uint64(1) << rng.integers(0, 64, len(values), np.uint64),
                           np.uint64(0))
    return values


@pytest.fixture(params=[8, 512], ids=["halves", "whole"])
def few(request, monkeypatch):
    """Test also with limits so small that the comparison splits into halves and many parts."""
    monkeypatch.setattr(duplicates, "_FEW", request.param)
    if request.param == 8:
        monkeypatch.setattr(duplicates, "_PAIRS", 50)
        monkeypatch.setattr(duplicates, "_MANY", (1, 0))
    return request.param


def hashes(values):
    return np.array([hashlib.sha256(str(value).encode()).digest() for value in values], "S32")


def test_rows_of_equal_hashes_get_the_first_row():
    assert duplicates.find_exact(hashes([1, 2, 1, 3, 2, 1])).tolist() == [0, 1, 0, 3, 1, 0]
    missing = np.array([True, False, False, False, True, False])
    assert duplicates.find_exact(hashes([1, 2, 1, 3, 2, 1]), missing).tolist() == [0, 1, 2, 3, 4, 2]
    assert duplicates.find_exact(hashes([])).shape == (0,) and duplicates.find_exact(hashes([5])).tolist() == [0]
    assert duplicates.find_exact(hashes([7] * 5)).tolist() == [0] * 5
    with pytest.raises(ValueError, match="shape"):
        duplicates.find_exact(hashes([1, 2]), np.zeros(3, bool))


def test_hashes_with_a_common_prefix_are_not_equal():
    rng = np.random.default_rng(0)
    values = np.array([bytes(rng.integers(0, 2, 3)).ljust(31, b"\1") + bytes([rng.integers(0, 3)]) for _ in range(500)],
                      "S32")
    alike = np.array([b"12345678" + bytes(rng.integers(0, 3, 2)) for _ in range(500)], "S10")
    for digests in (values, alike):
        first: dict[bytes, int] = {}
        expected = [first.setdefault(value, row) for row, value in enumerate(digests.tolist())]
        assert duplicates.find_exact(digests).tolist() == expected
    assert duplicates.find_exact(np.array([b"a", b"a\0", b"", b"b"], "S32")).tolist() == [0, 0, 2, 3]


def test_nearness_is_not_transitive():
    grey = [[100, 100, 100]] * 4
    assert check_find_near([0b000, 0b111, 0b111111, 0b1111111111], grey).tolist() == [0, 0, 2, 3]
    assert check_find_near([0, 7, 63, 1 << 63 | 7], [*grey[:3], [112, 88, 100]]).tolist() == [0, 0, 2, 3]
    assert check_find_near([7, 0, 63], grey[:3]).tolist() == [0, 0, 0]
    # The color too: 0 near 10 near 20.
    assert check_find_near([5] * 4, [[0, 0, 0], [10, 0, 0], [20, 0, 0], [13, 0, 0]]).tolist() == [0, 0, 2, 2]
    assert check_find_near([5, 5], [[0, 0, 0], [0, 0, 13]]).tolist() == [0, 1]
    assert check_find_near([2**64 - 1, 2**64 - 8], [[255] * 3, [243] * 3]).tolist() == [0, 0]
    assert duplicates.find_near(np.zeros(0, np.uint64), np.zeros((0, 3), np.uint8)).shape == (0,)


def test_rows_without_a_hash_stay_and_remove_no_other(few):
    rng = np.random.default_rng(1)
    missing = rng.random(200) < 0.4
    first_rows = check_find_near(np.zeros(200), rng.integers(0, 30, (200, 3)), missing=missing)
    assert (first_rows[missing] == np.flatnonzero(missing)).all() and not missing[first_rows[~missing]].any()
    assert check_find_near(np.zeros(5), np.zeros((5, 3)), missing=np.ones(5, bool)).tolist() == list(range(5))


@pytest.mark.parametrize("bits", [0, 1, 3, 6])
@pytest.mark.parametrize("distance", [0, 12, 255])
def test_random_rows_agree_with_every_pair_compared(bits, distance, few):
    rng = np.random.default_rng(bits * 1000 + distance)
    centres = rng.integers(0, 1 << 64, 12, dtype=np.uint64)
    phash = flip_bits(rng, centres[rng.integers(0, 12, 300)], 4)
    phash[rng.random(300) < 0.2] = rng.integers(0, 1 << 64, dtype=np.uint64)
    colours = [rng.integers(0, 256, (300, 3)), rng.integers(240, 256, (300, 3)), np.zeros((300, 3), int)]
    for colour in colours:
        first_rows = check_find_near(phash, colour, bits, distance)
    assert len(set(first_rows.tolist())) < 290


@pytest.mark.parametrize("free", ["low", "spread", "ball"])
def test_crowds_agree_with_every_pair_compared(free, few):
    """All hashes are within a few bits of each other, or differ only in a few bits, so many bands are equal."""
    rng = np.random.default_rng(7)
    if free == "low":
        phash = rng.integers(0, 1 << 12, 700, np.uint64)
    elif free == "spread":
        phash = sum(((rng.integers(0, 2, 700, np.uint64)) << np.uint64(place)) for place in range(0, 64, 6))
    else:
        phash = flip_bits(rng, np.full(700, 0x0123456789ABCDEF, np.uint64), 3)
    check_find_near(phash, np.full((700, 3), 9))
    check_find_near(phash, rng.integers(0, 60, (700, 3)))


def test_chains_are_walked_in_order(few):
    steps = [0]
    for place in itertools.islice(itertools.cycle(range(64)), 600):
        steps.append(steps[-1] ^ (1 << place) ^ (1 << (place * 7 + 3) % 64))
    for order in (np.arange(601), np.arange(601)[::-1], np.random.default_rng(0).permutation(601)):
        check_find_near(np.array(steps, np.uint64)[order], np.zeros((601, 3)))
    check_find_near(np.zeros(600), np.stack([np.arange(600) // 3, np.arange(600) % 256, np.zeros(600)], 1))


def test_the_bands_miss_no_pair_however_many_rows():
    rng = np.random.default_rng(3)
    for bits, count in itertools.product(range(17), (10, 10**5, 10**7, 10**10)):
        choices = duplicates._choices(bits, count)
        flips = [int(sum(1 << int(place) for place in rng.choice(64, bits, replace=False))) for _ in range(50)]
        for flip in flips:
            assert any(all(not flip >> shift & (1 << width) - 1 for shift, width in bands) for bands in choices)


def test_settings_out_of_range_are_refused():
    for settings in ({"bits": -1}, {"bits": 17}, {"colour_distance": 256}, {"missing": np.zeros(2, bool)}):
        with pytest.raises(ValueError):
            duplicates.find_near(np.zeros(1, np.uint64), np.zeros((1, 3), np.uint8), **settings)


@pytest.mark.parametrize("kind", ["blank", "white", "ball", "copies"])
def test_crowds_of_near_hashes_take_seconds(kind):
    """A comparison of every pair would take many minutes."""
    rng = np.random.default_rng(0)
    count = 100_000
    phash, colour = np.full(count, 1 << 63, np.uint64), rng.integers(0, 256, (count, 3))
    if kind == "white":
        colour = rng.integers(230, 256, (count, 3))
    elif kind == "ball":
        phash, colour = flip_bits(rng, phash, 4), np.full((count, 3), 255)
    elif kind == "copies":
        phash, colour = np.repeat(phash[:1], count), np.full((count, 3), 255)
    started = time.perf_counter()
    first_rows = duplicates.find_near(phash, colour.astype(np.uint8))
    assert time.perf_counter() - started < 60
    kept = np.flatnonzero(first_rows == np.arange(count))
    assert (first_rows[first_rows] == first_rows).all() and (first_rows <= np.arange(count)).all()
    assert len(kept) < 50_000
    for row in rng.integers(0, count, 300):
        earlier = kept[kept < row]
        differ = np.array([value.bit_count() for value in (phash[earlier] ^ phash[row]).tolist()], int) <= 3
        hits = earlier[differ & (np.abs(colour[earlier].astype(int) - colour[row]).max(1, initial=0) <= 12)]
        assert first_rows[row] == (hits[0] if len(hits) else row)
