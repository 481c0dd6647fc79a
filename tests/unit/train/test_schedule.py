"""The learning rate over a run's progress, whatever the sizes of its steps."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_vlm.config.schema import OptimConfig
from qwen3_vlm.train.optimizer import ProgressSchedule

LR, MIN_LR = 1.0, 0.1


def schedule(total: int, **optim: Any) -> ProgressSchedule:
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    return ProgressSchedule(optimizer, OptimConfig(**({"lr": LR, "min_lr": MIN_LR} | optim)), total)


def rates(run: ProgressSchedule, steps: list[int]) -> list[float]:
    result = []
    for units in steps:
        result.append(run.before_step(units))
        run.after_step(units)
    return result


@given(steps=st.lists(st.integers(1, 30), min_size=3, max_size=40))
def test_rises_then_falls_and_stays_within_its_bounds(steps: list[int]):
    lrs = rates(schedule(sum(steps), warmup_fraction=0.3), steps)
    peak = lrs.index(max(lrs))
    assert lrs[: peak + 1] == sorted(lrs[: peak + 1])
    assert lrs[peak:] == sorted(lrs[peak:], reverse=True)
    assert all(0 < lr <= LR for lr in lrs)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_ends_at_the_minimum_with_the_last_sample(decay: str):
    run = schedule(1000, decay=decay, warmup_fraction=0.1)
    lrs = rates(run, [1] * 1000)
    assert lrs[-1] == pytest.approx(MIN_LR, abs=1e-3)  # half a sample before the end
    assert run.before_step(0) == pytest.approx(MIN_LR, abs=1e-12)
    assert max(lrs) == pytest.approx(LR, abs=1e-3)
    assert lrs[100:].index(max(lrs[100:])) <= 1  # the peak is where the warm-up ends
    assert lrs[49] == pytest.approx(LR * 0.495)  # the middle of sample 50 of 100


def test_constant_stays():
    lrs = rates(schedule(100, decay="constant", warmup_fraction=0.1), [1] * 100)
    assert lrs[10:] == [LR] * 90


def test_a_whole_run_in_one_step_has_a_rate():
    assert 0 < rates(schedule(7, warmup_fraction=1.0), [7])[0] <= LR


def test_the_rate_depends_on_progress_and_not_on_steps():
    fine, coarse = schedule(100), schedule(100)
    rates(fine, [1] * 40)
    rates(coarse, [25, 15])
    assert fine.before_step(10) == coarse.before_step(10)


def test_a_longer_run_may_go_on_from_a_saved_position():
    saved = schedule(100)
    rates(saved, [50])
    longer = schedule(200)
    longer.scheduler.load_state_dict(saved.scheduler.state_dict())
    straight = schedule(200)
    rates(straight, [50])
    assert longer.before_step(10) == straight.before_step(10)
