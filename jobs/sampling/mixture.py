"""The databases that give the neighbours of a picture: one, or several by weight."""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from pipeline.datasets import published
from pipeline.datasets.dataset import Dataset

_WEIGHT = re.compile(r"\d{1,9}(\.\d{1,9})?")


@dataclass(frozen=True)
class Mixture:
    """Databases and the weights by which they share out the neighbours; mostly one database alone."""

    members: tuple[Dataset, ...]
    weights: tuple[Decimal, ...] = (Decimal(1),)

    @classmethod
    def parse(cls, root: str, text: str) -> "Mixture":
        """`noto`, or `noto:3+openmoji:1` below `root`, as published; a weight that is not given is 1."""
        members, weights = [], []
        for part in text.split("+"):
            name, colon, weight = part.partition(":")
            if colon and not (_WEIGHT.fullmatch(weight) and Decimal(weight)):
                raise ValueError(f"{text!r}: the weight {weight!r} of {name} is not a number above 0\n"
                                 f"hint: --database noto:3+openmoji:1")
            members.append(published.open_dataset(root, name))
            weights.append(Decimal(weight or 1).normalize())
        if len(set(members)) < len(members):
            raise ValueError(f"{text!r} names a database twice\nhint: give it a larger weight, as in noto:3+openmoji:1")
        return cls(tuple(members), tuple(weights))

    @property
    def label(self) -> str:
        """The name as the user may write it; of one database its own."""
        return self._joined(":")

    @property
    def item(self) -> str:
        """The name for files, which no other mixture has: no name of a dataset has these signs."""
        return self._joined("=").replace("@", "-")

    def _joined(self, sign: str) -> str:
        if len(set(self.weights)) == 1:
            return "+".join(one.label for one in self.members)
        return "+".join(f"{one.label}{sign}{weight:f}" for one, weight in zip(self.members, self.weights, strict=True))

    def shares(self, k: int) -> list[int]:
        """How many of k neighbours each database gives: by largest remainder, of equal ones the first named."""
        weights = [Fraction(weight) for weight in self.weights]
        quotas = [k * weight / sum(weights) for weight in weights]
        shares = [int(quota) for quota in quotas]
        by_remainder = sorted(range(len(quotas)), key=lambda number: shares[number] - quotas[number])
        for number in by_remainder[:k - sum(shares)]:
            shares[number] += 1
        return shares


def mixture(database: Dataset | Mixture) -> Mixture:
    """A database alone as the mixture that it is."""
    return database if isinstance(database, Mixture) else Mixture((database,))
