"""The learning rate against torch's own schedulers."""

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from pretrain.schedules import learning_rate_at


def test_cosine_equals_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = CosineAnnealingLR(optimizer, T_max=50, eta_min=0.01)
    for step in range(50):
        ours = learning_rate_at(step, peak=0.3, final=0.01, warmup_steps=0, total_steps=50)
        assert abs(ours - scheduler.get_last_lr()[0]) < 1e-12
        optimizer.step()
        scheduler.step()


def test_warmup_rises_to_the_peak_and_the_end_is_the_final_rate() -> None:
    rates = [learning_rate_at(step, peak=1.0, final=0.1, warmup_steps=4, total_steps=10) for step in range(11)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert abs(rates[10] - 0.1) < 1e-12
