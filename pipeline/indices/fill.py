"""Add vectors to a trained index, merge parts, and renumber rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.indices.faiss_door import (
    copy_to_gpus,
    count_gpus,
    faiss,
    inner_index,
    inner_ivf,
    inverted_lists,
    nearest_lists,
    send_stdout_to_stderr,
    transform_before_lists,
    untyped_faiss,
    use_safe_threads,
)


def fill(index: faiss.Index, vectors: np.ndarray) -> None:
    """Add vectors in order; to a graph with one thread, for with more it differs from run to run."""
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF) and not isinstance(inner, faiss.IndexIVFFastScan):
        fill_by_lists(index, vectors, copy_to_gpus if count_gpus() else None)
        return
    vectors = transform_before_lists(index, vectors)
    with use_safe_threads(inner):
        inner.add(vectors)
    index.ntotal = inner.ntotal


def fill_by_lists(index: faiss.Index, vectors: np.ndarray, place: Callable[[faiss.Index], faiss.Index] | None = None
                  ) -> None:
    """Add vectors whose lists are found where `place` puts the centers; the codes, of all kinds, are made here."""
    inner, vectors = inner_ivf(index), transform_before_lists(index, vectors)
    if place:
        centres = faiss.IndexFlat(inner.d, inner.quantizer.metric_type)
        centres.add(inner.quantizer.reconstruct_n(0, inner.nlist))
        lists = np.ascontiguousarray(place(centres).search(vectors, 1)[1][:, 0])
    else:
        lists = nearest_lists(inner.quantizer, vectors)
    with use_safe_threads(inner):
        inner.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(lists))
    index.ntotal = inner.ntotal


def merge(index: faiss.Index, part: faiss.Index) -> None:
    """Move the rows of `part` behind those of `index`, which was trained together with it."""
    inner, other = inner_index(index), inner_index(part)
    inner.merge_from(other, inner.ntotal) if isinstance(inner, faiss.IndexIVF) else inner.merge_from(other)
    index.ntotal = inner.ntotal


def lists_bytes(index: faiss.Index, count: int) -> int:
    """Bytes of the inverted lists of `count` rows; 0 for an index without lists."""
    inner = inner_index(index)
    return count * (inner.code_size + 8) if isinstance(inner, faiss.IndexIVF) else 0


def merge_on_disk(index: faiss.Index, parts: list[faiss.Index], path: Path, *, shift: bool = True) -> None:
    """Merge the lists of `parts` (opened by `mapped`) into the file `path`, as those of `index`, which is empty.

    The rows of each part come behind those of the part before, or with `shift` off have their numbers already.
    """
    inner = inner_ivf(index)
    pointers = untyped_faiss.InvertedListsPtrVector()
    for part in parts:
        pointers.push_back(inner_ivf(part).invlists)
    lists = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(path))
    with send_stdout_to_stderr():
        # Its own shifting takes the size of each part for that of all before it.
        index.ntotal = inner.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size(), False)
    starts = np.cumsum([0, *(part.ntotal for part in parts)])[:-1]
    for number in range(inner.nlist if shift else 0):
        sizes = [inverted_lists(inner_ivf(part)).list_size(number) for part in parts]
        if sum(sizes):
            ids = faiss.rev_swig_ptr(lists.get_ids(number), sum(sizes))  # the file itself, mapped
            ids += np.repeat(starts, sizes)
    # Without a folder, equal indices have equal bytes. Readers set the folder.
    lists.filename = path.name
    _give_lists(inner, lists)


def remove_rows(index: faiss.Index) -> faiss.Index:
    """The trained index without rows."""
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        _give_lists(inner, faiss.ArrayInvertedLists(inner.nlist, inner.code_size))
        index.ntotal = inner.ntotal = 0
    else:
        index.reset()
    return index


def _give_lists(inner: faiss.IndexIVF, lists: Any) -> None:
    """Replace the lists of an index, which then owns them."""
    inner.replace_invlists(lists, True)
    lists.this.disown()


def can_only_append(index: faiss.Index) -> bool:
    """Whether rows can be put behind those of an index, and neither leave it nor change their numbers."""
    inner = inner_index(index)
    return not isinstance(inner, faiss.IndexIVF | faiss.IndexFlatCodes) or isinstance(inner, faiss.IndexIVFFastScan)


def renumber(index: faiss.Index, sources: list[tuple[faiss.Index, np.ndarray]], loose: Path | None = None) -> None:
    """Fill `index`, which is empty, with the codes of others that were trained together with it.

    A source is an index and the row here of each of its rows, (N,) int64, -1 for what is left out. Rows come in
    ascending order, as if they had been added so. With `loose` the lists are in a file of that name.
    """
    inner = inner_index(index)
    total = sum(int((rows >= 0).sum()) for _, rows in sources)
    if isinstance(inner, faiss.IndexIVF):
        lists = (faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(loose)) if loose
                 else faiss.ArrayInvertedLists(inner.nlist, inner.code_size))
        with send_stdout_to_stderr():
            for number in range(inner.nlist):
                rows_and_codes = [_renumber_list(inner_ivf(source), rows, number) for source, rows in sources]
                ids = np.concatenate([part for part, _ in rows_and_codes])
                order = np.argsort(ids)
                ids, codes = ids[order], np.concatenate([part for _, part in rows_and_codes])[order]
                if len(ids):
                    lists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
        _give_lists(inner, lists)
    else:
        assert isinstance(inner, faiss.IndexFlatCodes)
        codes = np.empty((total, inner.code_size), np.uint8)
        for source, rows in sources:
            flat = inner_index(source)
            assert isinstance(flat, faiss.IndexFlatCodes)
            codes[rows[rows >= 0]] = faiss.vector_to_array(flat.codes).reshape(-1, inner.code_size)[rows >= 0]
        faiss.copy_array_to_vector(codes.reshape(-1), inner.codes)
    index.ntotal = inner.ntotal = total


def _renumber_list(inner: faiss.IndexIVF, rows: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The new rows in a list and their codes, those that stay."""
    lists = inverted_lists(inner)
    size = lists.list_size(number)
    if not size:
        return np.empty(0, np.int64), np.empty((0, inner.code_size), np.uint8)
    ids = rows[faiss.rev_swig_ptr(lists.get_ids(number), size)]
    codes = faiss.rev_swig_ptr(lists.get_codes(number), size * inner.code_size).reshape(size, inner.code_size)
    return ids[ids >= 0], codes[ids >= 0]
