"""Style classifiers: differences that they find, and differences that they must not find."""

import numpy as np
import pytest
import torch

from model import style_classifier


def _pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Squares anywhere on white: filled, or an outline alone."""
    rng = np.random.default_rng(seed)
    pictures, labels = np.full((count, 16, 16, 3), 255, np.uint8), rng.integers(2, size=count)
    for picture, label in zip(pictures, labels, strict=True):
        y, x = rng.integers(0, 6, size=2)
        picture[y:y + 10, x:x + 10] = rng.integers(0, 160, size=3)
        if label:
            picture[y + 1:y + 9, x + 1:x + 9] = 255
    return pictures, labels


def _vectors(count: int, centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    vectors = centre + 0.3 * rng.normal(size=(count, len(centre)))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.slow
def test_a_style_classifier_learns_styles() -> None:
    torch.set_num_threads(1)
    network = style_classifier.train_judge(*_pictures(200, 0), 2, steps=60, seed=0)
    pictures, labels = _pictures(200, 1)
    assert (style_classifier.classify_images(network, pictures) == labels).mean() > 0.95
    second_network = style_classifier.train_judge(*_pictures(200, 0), 2, steps=60, seed=0)
    assert all(torch.equal(tensor, second_tensor) for tensor, second_tensor in
               zip(network.state_dict().values(), second_network.state_dict().values(), strict=True))


@pytest.mark.slow
def test_a_rare_style_is_learned_as_well_as_a_frequent_one() -> None:
    torch.set_num_threads(1)
    pictures, labels = _pictures(400, 0)
    rare = np.concatenate([np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:12]])
    network = style_classifier.train_judge(pictures[rare], labels[rare], 2, steps=60, seed=0)
    pictures, labels = _pictures(200, 1)
    assert (style_classifier.classify_images(network, pictures[labels == 1]) == 1).mean() > 0.9


def test_the_probe_distinguishes_directions() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8)
    vectors = np.concatenate([_vectors(50, centre, rng) for centre in centres])
    labels = np.repeat(np.arange(3), 50)
    weights = style_classifier.train_probe(vectors, labels, 3)
    others = np.concatenate([_vectors(50, centre, rng) for centre in centres])
    assert weights.shape == (3, 9)
    assert (style_classifier.classify_vectors(weights, others) == labels).mean() > 0.95


def test_kid_is_near_zero_for_equal_sets_and_grows_with_distance() -> None:
    rng = np.random.default_rng(0)
    centre, other_centre = np.eye(2, 8)
    vectors = _vectors(150, centre, rng)
    kid_of_same = np.mean([style_classifier.kid(_vectors(100, centre, rng), _vectors(150, centre, rng))
                           for _ in range(20)])
    kid_of_near = style_classifier.kid(vectors, _vectors(150, centre + 0.3 * other_centre, rng))
    kid_of_far = style_classifier.kid(vectors, _vectors(150, other_centre, rng))
    assert abs(kid_of_same) < 0.01 < kid_of_near < kid_of_far
    assert np.isnan(style_classifier.kid(vectors[:1], vectors))


def test_kid_does_not_count_images_of_one_prompt_as_independent() -> None:
    rng = np.random.default_rng(2)
    centre = np.eye(2, 8)[0]
    real = _vectors(200, centre, rng)
    once = [_vectors(100, centre, rng) for _ in range(20)]
    twice = [np.repeat(samples[:50], 2, 0) for samples in once]  # two equal images of each prompt
    groups = np.repeat(np.arange(50), 2)
    grouped_kid = np.mean([style_classifier.kid(samples, real, groups) for samples in twice])
    assert abs(grouped_kid - np.mean([style_classifier.kid(samples, real) for samples in once])) < 0.02
    assert np.mean([style_classifier.kid(samples, real) for samples in twice]) > grouped_kid + 0.01
    assert np.isnan(style_classifier.kid(once[0][:2], real, np.zeros(2)))


def test_kid_equals_its_definition() -> None:
    rng = np.random.default_rng(1)
    fake, real = _vectors(5, np.ones(4), rng), _vectors(7, np.ones(4), rng)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(a.astype(np.float64) @ b.astype(np.float64) + 1) ** 3

    def mean_within(x: np.ndarray) -> float:
        return float(np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]))

    mean_across = np.mean([kernel(a, b) for a in fake for b in real])
    assert style_classifier.kid(fake, real) == pytest.approx(mean_within(fake) + mean_within(real) - 2 * mean_across)
