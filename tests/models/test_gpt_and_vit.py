import jax
import numpy as np
import optax
import pytest
from flax import nnx

from models.gpt import GPT
from models.vit import ViT


@pytest.mark.slow
def test_gpt_does_not_look_ahead():
    model = GPT(7, 8, depth=2, width=16, heads=2, rngs=nnx.Rngs(0))
    tokens = np.arange(8)[None] % 7
    other = tokens.copy()
    other[0, 5] = 0
    one, two = model(tokens), model(other)
    assert one.shape == (1, 8, 7)
    np.testing.assert_allclose(one[:, :5], two[:, :5], atol=1e-6)
    assert np.abs(one[:, 5:] - two[:, 5:]).max() > 1e-3


@pytest.mark.slow
def test_vit_sees_patches_and_where_they_are():
    model = ViT((8, 12, 3), 5, depth=1, width=16, heads=2, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    assert model(images).shape == (2, 5)
    assert model.positions.embedding.shape == (6, 16)
    swapped = images.at[:, :, :4].set(images[:, :, 4:8]).at[:, :, 4:8].set(images[:, :, :4])
    assert np.abs(model(images) - model(swapped)).max() > 1e-5
    model.positions.embedding[...] = np.zeros((6, 16))
    # Without positions, attention and the mean do not know in which order patches come.
    np.testing.assert_allclose(model(images), model(swapped), atol=1e-5)
    assert optax.tree.size(nnx.state(model, nnx.Param)) > 0
