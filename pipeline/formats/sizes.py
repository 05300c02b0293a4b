"""Sizes in bytes as people write them. The only parser of sizes."""

import re

_POWERS = ("", "K", "M", "G", "T")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", re.IGNORECASE)


def parse_size(text: str | int, name: str) -> int:
    """Bytes of a size.

    K, M, G and T are powers of 1000. Ki, Mi, Gi and Ti are powers of 1024. A B may follow, and digits alone are bytes.
    ValueError with the `name` of the setting if it is none.
    """
    number, power, binary = _parts(text, name)
    return int(number * (1024 if binary else 1000) ** power)


def stored_size(text: str | int, name: str) -> str:
    """The spelling of a size in the stored settings of an index.

    K, M, G and T are powers of 1024 there, as in the first versions of this program. So 4Gi is stored as 4G, and plans
    of those versions keep their fingerprints. Sizes with powers of 1000 are stored as digits.
    """
    _, power, binary = _parts(text, name)
    if not power:
        return str(text)
    return re.sub("i", "", str(text), flags=re.IGNORECASE) if binary else str(parse_size(text, name))


def read_stored_size(text: str) -> str:
    """The size that `stored_size` has spelled so."""
    return f"{text}i" if text[-1:].upper() in _POWERS[1:] else text


def is_decimal(text: str | int, name: str) -> bool:
    """Whether a size has a unit that is a power of 1000."""
    _, power, binary = _parts(text, name)
    return power > 0 and not binary


def _parts(text: str | int, name: str) -> tuple[float, int, bool]:
    """The number, the power of its unit, and whether that is a power of 1024."""
    match = _SIZE.fullmatch(str(text).strip())
    if not match:
        raise ValueError(f"{name} = {text!r}: must be a size\n"
                         f"hint: a number, with K, M, G, T (1000) or Ki, Mi, Gi, Ti (1024), as in 4Gi")
    return float(match[1]), _POWERS.index((match[2] or "").upper()), bool(match[3])
