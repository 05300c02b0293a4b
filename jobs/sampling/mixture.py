"""The databases that give the neighbors of an image: one, or several by weight."""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from pipeline.datasets.dataset import Dataset
from pipeline.releases import published

_WEIGHT = re.compile(r"\d{1,9}(\.\d{1,9})?")


@dataclass(frozen=True)
class Mixture:
    """Databases and their weights. In most cases it is one database."""

    members: tuple[Dataset, ...]
    weights: tuple[Decimal, ...] = (Decimal(1),)

    @classmethod
    def parse(cls, root: str, text: str) -> "Mixture":
        """Parse `noto` or `noto:3+openmoji:1`: published databases below `root`. The default weight is 1."""
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
        """The name as the user may write it; the label of the database if there is only one."""
        return self._joined(":")

    @property
    def item(self) -> str:
        """A unique name for files: the names of datasets do not contain its separators."""
        return self._joined("=").replace("@", "-")

    def _joined(self, sign: str) -> str:
        if len(set(self.weights)) == 1:
            return "+".join(database.label for database in self.members)
        return "+".join(f"{database.label}{sign}{weight:f}"
                        for database, weight in zip(self.members, self.weights, strict=True))

    def shares(self, k: int) -> list[int]:
        """How many of k neighbors each database gives, by largest remainder. The first named wins a tie."""
        weights = [Fraction(weight) for weight in self.weights]
        quotas = [k * weight / sum(weights) for weight in weights]
        shares = [int(quota) for quota in quotas]
        by_remainder = sorted(range(len(quotas)), key=lambda number: shares[number] - quotas[number])
        for number in by_remainder[:k - sum(shares)]:
            shares[number] += 1
        return shares


def as_mixture(database: Dataset | Mixture) -> Mixture:
    """A mixture of this database alone, or the mixture itself."""
    return database if isinstance(database, Mixture) else Mixture((database,))
