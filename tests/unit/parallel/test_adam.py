"""GroupStepAdamW is torch's AdamW with its step in the group."""

import copy

import pytest
import torch

from qwen3_vlm.parallel.adam import GroupStepAdamW

OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def test_equals_torch_bit_for_bit():
    ours, theirs = parameters(), parameters()
    run(GroupStepAdamW(ours, **OPTIONS), ours, range(6))
    run(torch.optim.AdamW(theirs, foreach=False, fused=False, **OPTIONS), theirs, range(6))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_step_lives_in_the_group_and_survives_a_round_trip():
    straight, resumed = parameters(), parameters()
    run(GroupStepAdamW(straight, **OPTIONS), straight, range(5))

    first = GroupStepAdamW(resumed, **OPTIONS)
    run(first, resumed, range(2))
    saved = copy.deepcopy(first.state_dict())
    assert saved["param_groups"][0]["step"] == 2
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in saved["state"].values())
    second = GroupStepAdamW(resumed, **OPTIONS)
    second.load_state_dict(saved)
    run(second, resumed, range(2, 5))
    assert second.param_groups[0]["step"] == 5
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_parameters_without_gradient_are_left_alone():
    params = parameters()
    optimizer = GroupStepAdamW(params, **OPTIONS)
    set_gradients(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    assert params[0] in optimizer.state


def test_what_it_does_not_do_is_refused():
    with pytest.raises(ValueError, match="adam_w_mode"):
        GroupStepAdamW(parameters(), adam_w_mode=False)
    with pytest.raises(ValueError, match="closure"):
        GroupStepAdamW(parameters()).step(lambda: 0.0)
