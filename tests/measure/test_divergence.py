"""KL and losses from slices of a vocabulary, against the plain formula in float64."""

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx.measure.divergence import join_slices, measure_slice


def plain(expected, found, targets):
    """KL, both losses and agreement, float64, over the whole vocabulary at once."""
    logs = []
    for logits in (expected, found):
        values = np.array(logits).astype(np.float64)
        values = values - values.max(axis=1, keepdims=True)
        logs.append(values - np.log(np.exp(values).sum(axis=1, keepdims=True)))
    rows = np.arange(len(targets))
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1)
    return divergence, -logs[0][rows, targets], -logs[1][rows, targets], logs[0].argmax(1) == logs[1].argmax(1)


def sliced(expected, found, targets, step):
    parts = [
        measure_slice(expected[:, start : start + step], found[:, start : start + step], mx.array(targets), start)
        for start in range(0, expected.shape[1], step)
    ]
    own = join_slices(parts)
    return own.divergence, own.reference_loss, own.loss, own.agrees


def logits(difference, *, tokens=50, vocab=1000, offset=0.0):
    mx.random.seed(3)
    expected = 3 * mx.random.normal((tokens, vocab))
    found = expected + difference * mx.random.normal((tokens, vocab)) + offset
    return expected, found, np.random.default_rng(3).integers(0, vocab, tokens)


@pytest.mark.parametrize("step", [1000, 300, 7])
@pytest.mark.parametrize("difference", [1e-4, 1e-3, 0.02, 0.1])
def test_small_divergences_are_exact(difference, step):
    values = logits(difference)
    found, expected = sliced(*values, step)[0], plain(*values)[0]
    np.testing.assert_allclose(found, expected, atol=1e-10, rtol=2e-5)
    assert expected.mean() < 0.01


@pytest.mark.parametrize("difference", [0.3, 2.0, 30.0, 1000.0])
def test_large_divergences_are_right_however_far_apart_the_models_are(difference):
    values = logits(difference)
    np.testing.assert_allclose(sliced(*values, 300)[0], plain(*values)[0], rtol=1e-5)


@pytest.mark.parametrize("offset", [0.5, -5.0, 200.0])
def test_what_all_logits_have_in_common_is_no_divergence(offset):
    values = logits(0.01, offset=offset)
    np.testing.assert_allclose(sliced(*values, 300)[0], plain(*values)[0], atol=1e-4 * max(1, abs(offset)) / 10)


@pytest.mark.parametrize("difference", [0.0, 0.02, 30.0])
def test_losses_and_agreement_are_those_of_the_whole_vocabulary(difference):
    values = logits(difference)
    for found, expected in zip(sliced(*values, 300)[1:], plain(*values)[1:], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_equal_models_have_no_divergence_at_all():
    expected, _, targets = logits(0.0)
    divergence, _, _, agrees = sliced(expected, expected, targets, 300)
    assert not divergence.any() and agrees.all()


def test_the_first_of_equal_logits_is_the_likeliest_across_slices():
    expected, found = mx.zeros((1, 10)), mx.zeros((1, 10))
    found[0, 7] = 1.0
    assert not sliced(expected, found, np.array([0]), 3)[3].any()
    expected[0, 7] = 1.0
    assert sliced(expected, found, np.array([0]), 3)[3].all()
