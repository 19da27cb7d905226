"""Effective rank and spread of features that are uniform, on a line, or at one point."""

import pytest
import torch

from pretrain.metrics.feature_rank import effective_rank, feature_spread


def test_collapsed_features_have_a_low_rank_and_spread() -> None:
    torch.manual_seed(0)
    uniform = torch.randn(2000, 16)
    line = torch.randn(2000, 1) * torch.ones(1, 16)
    point = torch.ones(2000, 16) + 1e-4 * uniform
    assert effective_rank(uniform) == pytest.approx(16, rel=0.02)
    assert effective_rank(line) == pytest.approx(1, rel=1e-6)
    assert feature_spread(uniform) == pytest.approx(1, abs=0.02)
    assert feature_spread(point) < 1e-3
