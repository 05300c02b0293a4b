"""Vectors -> neighbours of them in a mixture of databases; rows of these drawn from p_D."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from jobs.sampling.mixture import Mixture
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.indices.searcher import Searcher


@dataclass
class Near:
    """The neighbours of some queries, nearest first: each (Q, k), and their vectors (Q, k, D) float32."""

    members: np.ndarray
    """Numbers of the databases in the mixture."""
    rows: np.ndarray
    """Rows there, -1 for none."""
    scores: np.ndarray
    vectors: np.ndarray


@dataclass(frozen=True)
class Drawn:
    """A row drawn from p_D."""

    member: int
    row: int
    used: int
    """How often it is the neighbour of a training picture."""


class Retriever:
    """A mixture opened for search."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.searchers = [Searcher(one) for one in mixture.members]

    def nearest(self, vectors: np.ndarray, positions: Sequence[int], k: int, pool: int, seed: int,
                leading: Sequence[Drawn | None]) -> Near:
        """The k neighbours of each of the unit vectors (Q, D), shared out by weight and ordered by score.

        With a `pool` each database gives some at random of its so many nearest, which depends on (seed, position)
        alone. A `leading` row comes first, and takes a place of its database.
        """
        given = [self._given(member, share, vectors, positions, max(share, pool), seed, leading)
                 for member, share in enumerate(self.mixture.shares(k)) if share]
        if not given:
            return Near(*(np.empty((len(vectors), 0), kind) for kind in (np.int64, np.int64, np.float32)),
                        np.empty((len(vectors), 0, vectors.shape[1]), np.float32))
        members, rows, scores = (np.concatenate(parts, 1) for parts in zip(*given, strict=True))
        ranks = scores.copy()
        for number, lead in enumerate(leading):
            if lead:  # before copies of it, which are as near
                ranks[number, (members[number] == lead.member) & (rows[number] == lead.row)] = np.inf
        order = np.argsort(-ranks, axis=1, kind="stable")
        members, rows, scores = (np.take_along_axis(one, order, 1) for one in (members, rows, scores))
        found = np.zeros((*rows.shape, vectors.shape[1]), np.float32)
        for member, searcher in enumerate(self.searchers):
            there = members == member
            found[there] = searcher.embeddings.rows(rows[there])
        return Near(members, rows, scores, found)

    def _given(self, member: int, share: int, vectors: np.ndarray, positions: Sequence[int], depth: int, seed: int,
               leading: Sequence[Drawn | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What one database gives: its number, rows and scores, each (Q, share)."""
        rows, scores = self.searchers[member].search(vectors, depth)
        for number, (position, lead) in enumerate(zip(positions, leading, strict=True)):
            first = lead is not None and lead.member == member
            if first:
                others = rows[number] != lead.row
                rows[number] = [lead.row, *rows[number][others]][:depth]
                scores[number] = [vectors[number] @ vectors[number], *scores[number][others]][:depth]
            if depth > share:
                there = int((rows[number] >= 0).sum())
                chosen = _chosen(there, share, first, Random(f"{seed}/pool/{position}/{member}"))
                # What there is too little of is none at the end.
                chosen += range(depth - share + len(chosen), depth)
                rows[number, :share], scores[number, :share] = rows[number, chosen], scores[number, chosen]
        rows, scores = rows[:, :share], scores[:, :share]
        return np.full_like(rows, member), rows, scores

    def likely(self, train: Dataset, positions: Sequence[int], k: int, top_m: float, seed: int) -> list[Drawn]:
        """A row for each position, drawn from p_D of one of the databases, each as often as it gives neighbours."""
        owners = np.repeat(np.arange(len(self.searchers)), self.mixture.shares(k))
        likelies = {int(member): Likely(usage_of(train, self.mixture.members[member], self.searchers[member].hidden),
                                        top_m) for member in np.unique(owners)}
        drawn = []
        for position in positions:
            random = Random(f"{seed}/p_D/{position}")
            member = int(owners[random.randrange(k)])
            row = likelies[member].draw(random)
            drawn.append(Drawn(member, row, int(likelies[member].usage[row])))
        return drawn

    def vectors(self, drawn: Sequence[Drawn]) -> np.ndarray:
        """The vectors of such rows, (Q, D) float32."""
        return np.concatenate([self.searchers[one.member].embeddings.rows(np.array([one.row])) for one in drawn]
                              ).astype(np.float32)


class Likely:
    """p_D restricted to the fraction `top_m` of all rows that has the most of it, one row at least.

    Blattmann et al. 2022, arXiv:2204.11824, section 3.3.
    """

    def __init__(self, usage: np.ndarray, top_m: float) -> None:
        self.usage = usage
        count = max(1, round(top_m * len(usage)))
        self.rows = np.sort(np.argsort(-usage, kind="stable")[:count]) if count < len(usage) else np.arange(len(usage))
        self._ends = np.cumsum(usage[self.rows])
        if not len(self._ends) or not self._ends[-1]:
            raise ValueError("no row of the database is a neighbour of a training picture: there is nothing to draw")

    def draw(self, random: Random) -> int:
        """A row, as often as it is used."""
        return int(self.rows[np.searchsorted(self._ends, random.randrange(int(self._ends[-1])), side="right")])


def usage_of(train: Dataset, database: Dataset, gone: np.ndarray) -> np.ndarray:
    """How often each row of a database is a neighbour of a training picture, (M,) int64; 0 for rows that are `gone`."""
    name = f"neighbors/{database.label}"
    usage = np.load(train.fetch(name, file_of(train.manifest(name), "usage.npy")), allow_pickle=False)
    usage[gone] = 0
    return usage


def p_d_identity(train: Dataset, database: Dataset) -> dict[str, str]:
    """How p_D stands among the inputs of a stage; ValueError with the command that finds it."""
    name = f"neighbors/{database.label}"
    if not train.is_sealed(name):
        raise ValueError(f"how often rows of {database.label} are neighbours of pictures of {train.label} (p_D) is not "
                         f"known yet\nhint: {train.command(name)}")
    found = train.identity(name)
    if not any(entry["name"] == "usage.npy" for entry in train.manifest(name)["files"]):
        raise ValueError(f"{train.folder(name)} was made before p_D was counted\n"
                         f"hint: {train.command(name)} --overwrite")
    return found


def _chosen(there: int, share: int, first: bool, random: Random) -> list[int]:
    """`share` of so many places at random, ascending; the first of all in any case if asked."""
    kept = [0] if first else []
    others = range(len(kept), there)
    return kept + sorted(random.sample(others, min(share - len(kept), len(others))))
