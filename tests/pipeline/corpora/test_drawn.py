import io
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.corpora import drawn


def pixels(catalog, picture, size=64) -> np.ndarray:
    image = Image.open(io.BytesIO(drawn.render(catalog, picture, size)))
    assert image.mode == "RGB" and image.format == "PNG"
    return np.asarray(image).astype(float)


@pytest.fixture(scope="module")
def corpus():
    return drawn.catalog(400)


def test_the_catalog_has_every_subject_in_every_style_in_order(corpus):
    assert len(corpus.subjects) == 400 and len(corpus.pictures) == 2400
    assert corpus.styles == ("flat", "hatched", "lineart", "outline", "silhouette", "soft")
    order = [(picture.style, picture.subject) for picture in corpus.pictures]
    assert order == sorted(order) and len(set(order)) == len(order)
    assert {picture.key for picture in corpus.pictures} == set(corpus.drawings)
    assert all(picture.caption == picture.subject.replace("-", " ") for picture in corpus.pictures)
    assert all(picture.tags for picture in corpus.pictures)


def test_a_tenth_is_held_out_the_same_in_all_styles(corpus):
    held_out = {style: set() for style in corpus.styles}
    for picture in corpus.pictures:
        if picture.held_out:
            held_out[picture.style].add(picture.subject)
    assert len(held_out["flat"]) == 40
    assert all(subjects == held_out["flat"] for subjects in held_out.values())


def test_a_small_catalog_is_the_start_of_a_large_one(corpus):
    small = set(drawn.catalog(120).pictures)
    assert small < set(corpus.pictures)
    assert drawn.catalog(120, seed=1).subjects != drawn.catalog(120).subjects
    assert drawn.catalog(120).pictures == drawn.catalog(120).pictures


def test_larger_catalogs_have_named_groups_and_pairs():
    large = drawn.catalog(8000)
    assert len(large.subjects) == 8000
    joints = Counter(scene.joint for scene in large.drawings.values())
    assert set(joints) == {"", *drawn.JOINTS}
    assert all(
        drawn.SHAPES[scene.second.shape].roomy
        for scene in large.drawings.values()
        if scene.joint == "inside"
    )


def test_more_subjects_than_exist_are_refused():
    for subjects in (0, drawn.POSSIBLE + 1):
        with pytest.raises(ValueError, match="subjects="):
            drawn.catalog(subjects)


def test_counted_subjects_are_as_many_as_can_be_made():
    scenes = (drawn._pair(number, "", "") for number in range(drawn.PAIRS))
    names = {
        scene.name
        for scene in scenes
        if scene.joint != "inside" or drawn.SHAPES[scene.second.shape].roomy
    }
    assert len(names) == drawn.PAIRS - drawn.CRAMPED


def test_rendering_is_deterministic_and_of_any_size(corpus):
    for picture in corpus.pictures[::173]:
        for size in (1, 8, 17, 64, 300):
            png = drawn.render(corpus, picture, size)
            assert png == drawn.render(corpus, picture, size)
            assert Image.open(io.BytesIO(png)).size == (size, size)


def test_no_image_is_blank_or_touches_every_edge():
    corpus = drawn.catalog(8000)
    for picture in corpus.pictures[::97]:
        drawing = pixels(corpus, picture, 32)
        assert drawing.min() < 200, picture.key
        edge = np.concatenate([drawing[0], drawing[-1], drawing[:, 0], drawing[:, -1]])
        assert np.median(edge) > 240, picture.key


def test_styles_are_truly_different(corpus):
    """Simple statistics of the pixels distinguish each style from the others."""
    statistics = {}
    for style in corpus.styles:
        pictures = [picture for picture in corpus.pictures if picture.style == style][::8]
        drawings = np.stack([pixels(corpus, picture) for picture in pictures])
        colourful = (drawings.max(3) - drawings.min(3)).mean()
        grey = drawings.mean(3)
        inked = (grey < 250).mean((1, 2))
        edges = (np.abs(np.diff(grey, axis=1)).mean((1, 2)) / inked).mean()
        statistics[style] = np.array(
            [colourful, (grey < 60).mean() * 255, (255 - grey).mean(), edges]
        )
    for black in ("silhouette", "lineart"):
        assert statistics[black][0] == 0  # no color
    assert all(statistics[style][0] > 5 for style in ("flat", "hatched", "outline", "soft"))
    assert statistics["silhouette"][1] > 5 * statistics["lineart"][1]
    assert statistics["outline"][1] > 5 and statistics["soft"][1] < 1
    assert statistics["hatched"][3] > 1.5 * statistics["flat"][3]
    assert statistics["soft"][3] < 0.9 * statistics["flat"][3]
    for first in statistics:
        for second in statistics:
            assert first == second or np.abs(statistics[first] - statistics[second]).max() > 5


def test_subjects_keep_their_color(corpus):
    by_key = {picture.key: picture for picture in corpus.pictures}
    red = pixels(corpus, by_key["flat/red-heart"]).mean((0, 1))
    blue = pixels(corpus, by_key["flat/blue-heart"]).mean((0, 1))
    assert red[0] > red[2] + 30 and blue[2] > blue[0] + 30


def test_rendering_is_quick(corpus):
    pictures = corpus.pictures[::12]
    begun = time.process_time()
    for picture in pictures:
        drawn.render(corpus, picture, 64)
    # Measured 1.3 ms; the bound leaves room for slow machines.
    assert (time.process_time() - begun) / len(pictures) < 0.01


def test_sources_name_every_style_and_a_license(corpus):
    rows = drawn.sources()
    assert [row["style"] for row in rows] == list(corpus.styles)
    assert all(row["licence_spdx"] and row["licence_url"] for row in rows)
