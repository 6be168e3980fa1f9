import jax.numpy as jnp
import numpy as np

from training.step import LOSSES

LOGITS = np.random.RandomState(0).standard_normal((5, 7)).astype(np.float32)
LABELS = np.array([0, 6, 3, 3, 1])


def test_mse_is_the_mean_over_batch_and_classes_against_scaled_one_hot():
    target = np.sqrt(7) * np.eye(7)[LABELS]
    expected = np.mean((LOGITS - target) ** 2)
    np.testing.assert_allclose(jnp.mean(LOSSES["mse"](LOGITS, LABELS)), expected, rtol=1e-6)


def test_xent_is_softmax_cross_entropy():
    log_p = LOGITS - np.log(np.sum(np.exp(LOGITS), axis=1, keepdims=True))
    expected = -np.mean(log_p[range(5), LABELS])
    np.testing.assert_allclose(jnp.mean(LOSSES["xent"](LOGITS, LABELS)), expected, rtol=1e-6)
