"""Rescaling: neurons that share a scale and matter more are rounded more finely, and alike ones are left alone."""

import mlx.core as mx
import numpy as np

from arcee_mlx.checkpoint.quantization import Quantization
from arcee_mlx.conversion.error_feedback import round_to_nearest
from arcee_mlx.conversion.rescale import NeuronUse, choose_factors
from arcee_mlx.model.activations import relu2

GROUPS_OF_32 = Quantization(bits=4, group_size=32)


def use_of(inputs):
    use = NeuronUse()
    for part in np.array_split(inputs, 3):
        use.add(mx.array(part), relu2)
    return use


def test_neurons_that_matter_more_are_rounded_more_finely():
    """Neurons that share a scale and differ by four powers of ten in use."""
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=(600, 128)) * np.exp(1.2 * rng.normal(size=128))).astype(np.float32)
    use, down = use_of(inputs), rng.normal(size=(96, 128)).astype(np.float32)
    factors = choose_factors(down, use, GROUPS_OF_32, mx.bfloat16)
    assert not (factors == 1).all() and (factors > 0).all()
    neurons = np.square(np.maximum(inputs, 0))

    def error(scale):
        rounded = round_to_nearest(down * scale, GROUPS_OF_32, mx.bfloat16, use.importance / scale**2)
        return np.square(neurons @ (rounded.values / scale - down).T).sum()

    assert error(factors) < 0.9 * error(np.ones_like(factors))
    np.testing.assert_allclose(use.maxima, inputs.max(axis=0), rtol=1e-6)
    assert factors[use.importance.argmax()] > 1 > factors[use.importance.argmin()]


def test_neurons_that_are_all_alike_are_left_alone():
    use = use_of(np.ones((4, 128), np.float32))
    assert (choose_factors(np.random.default_rng(1).normal(size=(96, 128)), use, GROUPS_OF_32, mx.bfloat16) == 1).all()
