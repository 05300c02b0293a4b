import json

import pytest

from pipeline.indices.choose import estimated_bytes, factory_keys
from pipeline.indices.config import IndexConfig
from tests.pipeline.indices.golden import autofaiss_answers

STORED = json.loads(autofaiss_answers.PATH.read_text())


def test_autofaiss_gives_the_stored_answers():
    """A newer autofaiss, faiss or numpy that chooses other indices would change every dataset's index unnoticed."""
    assert len(STORED) == 210 and len({key for answer in STORED for key in answer["keys"]}) > 20
    assert autofaiss_answers.answers() == STORED


@pytest.mark.parametrize("count", autofaiss_answers.COUNTS)
def test_the_index_stage_tries_the_kinds_of_autofaiss_first(count):
    for answer in STORED:
        if answer["count"] == count:
            chosen = list(dict.fromkeys(answer["keys"]))
            assert factory_keys(count, answer["dim"], answer["KiB"] << 10, IndexConfig())[:len(chosen)] == chosen
            for key, size in zip(answer["keys"], answer["bytes"], strict=True):
                if "," in key or "HNSW" in key:  # the stage has its own formulas for the others
                    assert estimated_bytes(key, count, answer["dim"]) == size
