"""Neighbors of vectors in a mixture of databases, and rows sampled from p_D."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from jobs.sampling.mixture import Mixture
from pipeline.datasets.dataset import Dataset, file_of
from pipeline.formats import arrays
from pipeline.indices.searcher import Searcher


@dataclass
class RetrievedNeighbors:
    """The neighbors of queries, nearest first: each (Q, k), and their vectors (Q, k, D) float32."""

    members: np.ndarray
    """Numbers of the databases in the mixture."""
    rows: np.ndarray
    """Rows there, -1 for none."""
    scores: np.ndarray
    vectors: np.ndarray


@dataclass(frozen=True)
class SampledRow:
    """A row sampled from p_D."""

    member: int
    row: int
    used: int
    """How often it is the neighbor of a training image."""


class Retriever:
    """A mixture opened for search."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.searchers = [Searcher(database) for database in mixture.members]

    def nearest(self, vectors: np.ndarray, positions: Sequence[int], k: int, pool: int, seed: int,
                first_rows: Sequence[SampledRow | None]) -> RetrievedNeighbors:
        """The k neighbors of each of the unit vectors (Q, D), divided between databases by weight, ordered by score.

        With a `pool` each database gives random ones of its `pool` nearest. The choice depends only on (seed,
        position). A `first_rows` row comes first, and takes a place of its database.
        """
        found_by_member = [self._search_database(member, share, vectors, positions, max(share, pool), seed, first_rows)
                 for member, share in enumerate(self.mixture.shares(k)) if share]
        if not found_by_member:
            none = np.empty((len(vectors), 0), np.int64)
            return RetrievedNeighbors(none, none, none.astype(np.float32),
                                      np.empty((len(vectors), 0, vectors.shape[1]), np.float32))
        members, rows, scores = (np.concatenate(parts, 1) for parts in zip(*found_by_member, strict=True))
        ranks = scores.copy()
        for number, lead in enumerate(first_rows):
            if lead:  # before copies of it, which are as near
                ranks[number, (members[number] == lead.member) & (rows[number] == lead.row)] = np.inf
        order = np.argsort(-ranks, axis=1, kind="stable")
        members, rows, scores = (np.take_along_axis(values, order, 1) for values in (members, rows, scores))
        neighbor_vectors = np.zeros((*rows.shape, vectors.shape[1]), np.float32)
        for member, searcher in enumerate(self.searchers):
            mask = members == member
            neighbor_vectors[mask] = searcher.embeddings.rows(rows[mask])
        return RetrievedNeighbors(members, rows, scores, neighbor_vectors)

    def _search_database(self, member: int, share: int, vectors: np.ndarray, positions: Sequence[int], depth: int,
                         seed: int, first_rows: Sequence[SampledRow | None]
                         ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The share of one database: its number, rows and scores, each (Q, share)."""
        rows, scores = self.searchers[member].search(vectors, depth)
        for number, (position, lead) in enumerate(zip(positions, first_rows, strict=True)):
            first = lead is not None and lead.member == member
            if lead is not None and first:
                others = rows[number] != lead.row
                rows[number] = [lead.row, *rows[number][others]][:depth]
                scores[number] = [vectors[number] @ vectors[number], *scores[number][others]][:depth]
            if depth > share:
                count = int((rows[number] >= 0).sum())
                chosen = _choose_ranks(count, share, first, Random(f"{seed}/pool/{position}/{member}"))
                # If there are too few neighbors, the last places stay empty.
                chosen += range(depth - share + len(chosen), depth)
                rows[number, :share], scores[number, :share] = rows[number, chosen], scores[number, chosen]
        rows, scores = rows[:, :share], scores[:, :share]
        return np.full_like(rows, member), rows, scores

    def sample_rows(self, train: Dataset, positions: Sequence[int], k: int, top_m: float, seed: int
                    ) -> list[SampledRow]:
        """A row for each position, sampled from p_D of the databases in proportion to their shares."""
        owners = np.repeat(np.arange(len(self.searchers)), self.mixture.shares(k))
        counts = {int(member): neighbor_counts(train, self.mixture.members[member], self.searchers[member].hidden)
                  for member in np.unique(owners)}
        distributions = {member: RowDistribution(usage, top_m) for member, usage in counts.items()}
        sampled = []
        for position in positions:
            random = Random(f"{seed}/p_D/{position}")
            member = int(owners[random.randrange(k)])
            row = distributions[member].sample_row(random)
            sampled.append(SampledRow(member, row, int(distributions[member].usage[row])))
        return sampled

    def vectors(self, sampled: Sequence[SampledRow]) -> np.ndarray:
        """The vectors of sampled rows, (Q, D) float32."""
        return np.concatenate([self.searchers[row.member].embeddings.rows(np.array([row.row])) for row in sampled]
                              ).astype(np.float32)


class RowDistribution:
    """p_D restricted to the fraction `top_m` of rows with the highest p_D, at least one row.

    Blattmann et al. 2022, arXiv:2204.11824, section 3.3.
    """

    def __init__(self, usage: np.ndarray, top_m: float) -> None:
        self.usage = usage
        count = max(1, round(top_m * len(usage)))
        self.rows = np.sort(np.argsort(-usage, kind="stable")[:count]) if count < len(usage) else np.arange(len(usage))
        self._ends = np.cumsum(usage[self.rows])
        if not len(self._ends) or not self._ends[-1]:
            raise ValueError("no row of the database is a neighbor of a training image: p_D is zero everywhere")

    def sample_row(self, random: Random) -> int:
        """A random row. The probability of each is its share of `usage`."""
        return int(self.rows[np.searchsorted(self._ends, random.randrange(int(self._ends[-1])), side="right")])


def neighbor_counts(train: Dataset, database: Dataset, hidden: np.ndarray) -> np.ndarray:
    """How often each row of a database is a neighbor of a training image, (M,) int64; 0 for `hidden` rows."""
    name = f"neighbors/{database.label}"
    usage = arrays.load_array(train.fetch(name, file_of(train.manifest(name), "usage.npy")))
    usage[hidden] = 0
    return usage


def p_d_identity(train: Dataset, database: Dataset) -> dict[str, str]:
    """The input of a stage that p_D comes from; ValueError with the command that makes it."""
    name = f"neighbors/{database.label}"
    if not train.is_sealed(name):
        raise ValueError(f"p_D is unknown: the neighbors of {train.label} in {database.label} are not sealed\n"
                         f"hint: {train.command(name)}")
    identity = train.identity(name)
    if not any(entry["name"] == "usage.npy" for entry in train.manifest(name)["files"]):
        raise ValueError(f"{train.folder(name)} was made before p_D was counted\n"
                         f"hint: {train.command(name)} --overwrite")
    return identity


def _choose_ranks(count: int, share: int, first: bool, random: Random) -> list[int]:
    """`share` of `count` ranks at random, ascending. With `first`, rank 0 is always among them."""
    kept = [0] if first else []
    others = range(len(kept), count)
    return kept + sorted(random.sample(others, min(share - len(kept), len(others))))
