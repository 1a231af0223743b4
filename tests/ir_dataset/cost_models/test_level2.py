"""The network learns two labels at once, with some of them missing."""

from __future__ import annotations

import numpy as np
import pytest

from ir_dataset.cost_models.level2 import EMBEDDING, Network, NetworkSettings
from rewriter.errors import InputError


def test_two_labels_and_an_embedding() -> None:
    random = np.random.default_rng(0)
    features = random.poisson(20, (1200, 6)).astype(np.float32)
    first = 5 + features[:, 0] * 4.0 + features[:, 1]
    second = first * 2
    second[::3] = np.nan
    settings = NetworkSettings(epochs=20, batch_size=128)
    network = Network.fit(features, [first, second], settings, seed=0)
    told = network.predict(features)
    assert np.mean(np.abs(told[:, 0] / first - 1)) < 0.08
    assert np.nanmean(np.abs(told[:, 1] / second - 1)) < 0.08
    assert network.embed(features[:3]).shape == (3, EMBEDDING)
    again = Network.fit(features, [first, second], settings, seed=0)
    assert np.array_equal(again.predict(features[:9]), told[:9])


def test_refuses() -> None:
    with pytest.raises(InputError, match="labels"):
        Network.fit(np.ones((3, 2), np.float32), [np.ones(2)])
    with pytest.raises(InputError, match="features"):
        Network.fit(-2 * np.ones((3, 2), np.float32), [np.ones(3)])
