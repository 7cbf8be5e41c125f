"""The audit: right loops are proved, wrong ones get their cause, unwatchable ones one line."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from accumexp.proof import audit
from accumexp.proof.audit import epoch_sizes
from accumexp.proof.audit_samples import sample_keys

from ..support.ranks import on_ranks
from .audited_loops import (
    Loop,
    audited_on_this_rank,
    by_nothing,
    by_number,
    by_steps,
    classes,
    closure,
    coupled,
    network,
    scaled,
    shuffled,
    stream,
    tokens,
    windows,
)

RIGHT: dict[str, Callable[..., Any]] = {
    "sum over the window's samples": Loop(),
    "adamw": Loop(optimizer=torch.optim.AdamW),
    "clipped": Loop(clip=0.05),
    "schedule by update": Loop(schedule="update"),
    "logged": Loop(logged=lambda total, count: round(total, 4)),
    "tokens": tokens(mean_of_means=False),
    "closure": closure,
    "three epochs": Loop(epochs=3),
}
WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "not divided": (Loop(divide=by_nothing, mean=True), r"the gradient is 4 times .* not divided"),
    "divided by steps": (
        Loop(divide=by_steps, mean=True),
        r"micro-batches of 8, 8 and 4 samples count 0\.625, 0\.625 and 1\.25 times: .*3 micro-batches are "
        r"divided by 4, whatever their number of samples",
    ),
    "mean of means": (Loop(divide=by_number, mean=True), r"8, 8 and 4 samples count 0\.8333\d*, .*alike"),
    "mean of tokens' means": (tokens(mean_of_means=True), r"count .* times: .*alike, though they weigh"),
    "a step for each": (
        Loop(step_for_each=True),
        r"steps 4 times at the end of updates 1, 2, .* with one micro-batch 1",
    ),
    "clipped each": (Loop(clip=0.05, clip_each=True), r"clipped after micro-batch 1, 2, 3 of 4 too"),
    "schedule by micro-batch": (Loop(schedule="micro-batch"), r"schedule is stepped once a micro-batch"),
    "a group not scaled": (Loop(unscaled_head=True), r"parameter group 1 is 4 times"),
    "hidden by clipping": (
        Loop(divide=by_nothing, mean=True, clip=1e-3),
        r"before it is clipped, the gradient is 4 times .*clipping leaves .* of it",
    ),
    "extra update": (stream("early"), r"updates \d to \d take .* 7 updates|updates in all instead of"),
    "over the epoch's end": (stream("over the end"), r"samples of two epochs .*goes on over the epoch's end"),
    "reset tail": (stream("reset"), r"never reach the optimizer: 20 in 3 .* and 20 whose gradient is reset"),
    "batch norm": (Loop(norm=True), r"1 \(BatchNorm1d\): statistics over 8 of 32 samples"),
    "coupled": (coupled, r"the model or the loss couples the samples"),
}


def alone(fit: Callable[..., Any]) -> Callable[..., Any]:
    """`fit` without its parameter `samples`: its own epoch alone."""
    return lambda watch, steps, micro: fit(watch, steps, micro)


@pytest.mark.parametrize("name", RIGHT)
def test_right_loops_are_proved(name: str) -> None:
    certificate = audit(alone(RIGHT[name]))

    assert str(certificate) == "proved"
    assert {check.name for check in certificate.checks} >= {"gradient", "samples by update", "learning rate"}
    assert all(check.decided for check in certificate.checks)
    gradient = next(check for check in certificate.checks if check.name == "gradient")
    assert "another order of the samples and scale of the loss" in gradient.why
    assert all(abs(count - 1) < 1e-9 for each in certificate.counts for row in each.counts for count in row)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_loops_get_their_cause(name: str) -> None:
    fit, expected = WRONG[name]
    certificate = audit(alone(fit))

    assert certificate.verdict == "not proved"
    assert re.search(expected, str(certificate)), str(certificate)
    json.loads(certificate.as_json())


def test_dropout_is_held_fixed_by_sample() -> None:
    certificate = audit(alone(Loop(dropout=0.3)))

    assert str(certificate) == "proved up to dropout draws (3)"
    wrong = audit(alone(Loop(dropout=0.3, divide=by_nothing, mean=True)))
    assert str(wrong).startswith("not proved: ") and "4 times the larger batch's" in str(wrong)


def test_dropout_does_not_change_the_order_of_a_shuffled_loader() -> None:
    def fit(watch: Any, steps: int, micro: int) -> None:
        model = watch(network(dropout=0.3).to(watch.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs, targets = classes(64, watch.dtype)
        for _ in range(3):
            order = torch.randperm(64)
            for window in windows((inputs[order], targets[order]), steps, micro):
                for x, y in window:
                    (cross_entropy(model(x), y) / len(window)).backward()
                optimizer.step()
                optimizer.zero_grad()

    assert str(audit(fit)) == "proved up to dropout draws (3)"


def test_every_update_is_judged_by_itself() -> None:
    """With an optimizer that has a memory of the updates that are wrong."""
    certificate = audit(alone(Loop(divide=by_steps, mean=True, optimizer=torch.optim.AdamW)))

    assert certificate.series[0].failing == [3, 6]
    assert [check.name for check in certificate.failed] == ["gradient"]


def test_every_remainder_is_tried_where_the_loop_takes_samples() -> None:
    """The last window is wrong at one remainder alone, which the verdict names."""

    def fit(watch: Any, steps: int, micro: int, *, samples: int) -> None:
        count = -(-samples // micro)
        seen.append(count)
        wrong = steps == 4 and count % 4 == 3
        Loop(divide=by_nothing if wrong else Loop().divide)(watch, steps, micro, samples)

    seen: list[int] = []
    certificate = audit(fit, steps=4, micro=8)

    assert sorted({count % 4 for count in seen if count > 2}) == [0, 1, 2, 3]
    assert certificate.verdict == "not proved"
    assert "; with 7 micro-batches an epoch (3 left over)" in str(certificate)
    assert str(audit(lambda watch, steps, micro, samples: Loop()(watch, steps, micro, samples))) == "proved"
    assert [-(-size // 8) % 4 for size in epoch_sizes(4, 8)] == [0, 1, 2, 3]


def test_what_is_recorded() -> None:
    certificate = audit(
        alone(Loop(divide=by_steps, mean=True, schedule="update", logged=lambda total, _: total))
    )
    subject = json.loads(certificate.as_json())["subject"]

    assert subject["updates"] == subject["updates_of_larger_batch"] == 6
    assert subject["micro_batches_by_update"][2] == [[8, 8, 4]]
    assert subject["samples_by_update"] == [32, 32, 20, 32, 32, 20]
    assert subject["learning_rates"][1] == pytest.approx([0.05, 0.025])
    assert subject["samples_never_used"] == 0
    assert len(subject["logged_losses"]) == 6
    assert certificate.counts[0].where == "update 1"
    assert certificate.counts[0].counts == [pytest.approx([1.0] * 4)]
    assert certificate.counts[1].counts == [pytest.approx([0.625, 0.625, 1.25])]
    assert certificate.series[0].failing == [3, 6]


def test_a_wrong_logged_loss_alone_is_told_apart_from_the_update() -> None:
    certificate = audit(alone(Loop(logged=lambda total, count: total / count)))

    expected = "not proved: the update is the larger batch's, but another loss is logged"
    assert str(certificate).startswith(expected)


def test_loss_finds_a_fault_that_one_micro_batch_has_too() -> None:
    def fit(watch: Any, steps: int, micro: int) -> None:
        model = watch(network().to(watch.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs, targets = classes(64, watch.dtype)
        for start in range(0, 64, steps * micro):
            optimizer.zero_grad()
            for x, y in zip(
                inputs[start : start + steps * micro].split(micro),
                targets[start : start + steps * micro].split(micro),
                strict=True,
            ):
                watch.targets(y)
                (3 * cross_entropy(model(x), y) / steps).backward()
            optimizer.step()

    assert audit(fit).proved
    certificate = audit(fit, loss=lambda model, x, y: cross_entropy(model(x), y))
    assert "the loop's own gradient is 3 times that of loss=" in str(certificate)
    assert audit(fit, loss=lambda model, x, y: 3 * cross_entropy(model(x), y)).proved


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_mixed_precision_has_a_measured_bound(autocast: torch.dtype) -> None:
    right = audit(scaled(autocast), dtype=torch.float32)

    assert str(right) == "proved"
    bound = next(check.bound for check in right.checks if check.name == "gradient")
    assert 1e-5 < bound < 0.25
    wrong = audit(scaled(autocast, wrong=True), dtype=torch.float32)
    assert re.search(r"gradient is (4|3\.9\d+|4\.0\d+) times .* not divided", str(wrong))


def test_ranks_agree_on_one_certificate(tmp_path: Path) -> None:
    kinds = ["right", "divided by steps", "added", "not reduced"]
    first, second = on_ranks(2, tmp_path, audited_on_this_rank, kinds)

    assert first == second
    right, divided, added, apart = (text for text, _, _ in first)
    assert right == "proved" and first[0][1:] == ([pytest.approx([1.0] * 4)] * 2, [[8, 8, 4]] * 2)
    assert "0.625 times the larger batch's" in divided and "update 3 of 3" in divided
    assert "2 times the larger batch's: added over 2 ranks and not averaged" in added
    assert "the gradients of ranks 0 and 1 differ" in apart


def test_unwatchable_loops_get_one_line() -> None:
    def unwatched(watch: Any, steps: int, micro: int) -> None:
        pass

    def uncalled(watch: Any, steps: int, micro: int) -> None:
        watch(network())

    def no_step(watch: Any, steps: int, micro: int) -> None:
        watch(network())(torch.randn(micro, 6)).sum().backward()

    def other_tensors(watch: Any, steps: int, micro: int) -> None:
        model = watch(network())
        copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
        model(torch.randn(micro, 6)).sum().backward()
        torch.optim.SGD(copies, lr=0.1).step()

    def no_gradient(watch: Any, steps: int, micro: int) -> None:
        model = watch(network())
        model(torch.randn(micro, 6))
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    def two_models(watch: Any, steps: int, micro: int) -> None:
        watch(network())
        watch(network())

    def random_data(watch: Any, steps: int, micro: int) -> None:
        model = watch(network())
        model(torch.randn(micro, 6, generator=torch.Generator().manual_seed(micro))).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    def noisy(watch: Any, steps: int, micro: int) -> None:
        model = watch(network().to(watch.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in classes(64, watch.dtype)[0].split(steps * micro):
            for part in x.split(micro):
                noise.append(1.0 + len(noise))
                (noise[-1] * model(part).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()

    noise: list[float] = []
    for fit, line in (
        (unwatched, "never called watch"),
        (uncalled, "never called with gradients"),
        (no_step, "no torch optimizer"),
        (other_tensors, "holds other tensors"),
        (no_gradient, "are None"),
        (two_models, "second model"),
        (random_data, "receives other samples"),
        (shuffled, "a loader that does not shuffle"),
        (noisy, "two runs of the larger batch differ by"),
    ):
        with pytest.raises(ValueError, match=line) as raised:
            audit(fit)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="steps >= 2"):
        audit(alone(Loop()), steps=1)


def test_updates_that_a_loss_scaler_skips_are_no_proof() -> None:
    def fit(watch: Any, steps: int, micro: int) -> None:
        model = watch(network().to(watch.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # pyright: ignore
        for x in classes(64, watch.dtype)[0].split(steps * micro):
            for part in x.split(micro):
                scaler.scale(model(part).sum() * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()

    with pytest.raises(ValueError, match="no update could be compared: the loss scaler skipped 2 of 2"):
        audit(fit)


def test_a_copy_of_the_model_is_told_apart() -> None:
    def fit(watch: Any, steps: int, micro: int) -> None:
        def with_average(model: nn.Module) -> nn.Module:
            model = watch(model)
            averages.append(copy.deepcopy(model))
            model.register_forward_hook(average)
            return model

        def average(*_: Any) -> None:
            averages[-1](torch.zeros(3, 6, dtype=watch.dtype))

        with_average.dtype = watch.dtype  # type: ignore[attr-defined]
        alone(Loop())(with_average, steps, micro)

    averages: list[nn.Module] = []
    assert str(audit(fit)) == "proved"


def test_a_compiled_model_is_watched() -> None:
    def fit(watch: Any, steps: int, micro: int) -> None:
        watched = watch(network().to(watch.dtype))
        model = torch.compile(watched, backend="eager")
        optimizer = torch.optim.SGD(watched.parameters(), lr=0.1)
        for x in classes(64, watch.dtype)[0].split(steps * micro):
            for part in x.split(micro):
                model(part).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert "the gradient is 4 times" in str(audit(fit))


def test_padding_does_not_change_a_sample() -> None:
    short = torch.tensor([[5, 3, 1, 1], [5, 3, 2, 2]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    longer = torch.tensor([[5, 3, 1, 1, 1, 1]])
    longer_mask = torch.tensor([[1, 1, 0, 0, 0, 0]])

    keys = sample_keys({"ids": short, "attention_mask": mask})
    assert keys[0] == sample_keys({"ids": longer, "attention_mask": longer_mask})[0] != keys[1]
    assert sample_keys(torch.tensor([[5, 3, 0]])) == sample_keys(torch.tensor([[5, 3, 0, 0]]))
    assert sample_keys(torch.tensor([[5.0, 3.0, 0.0]])) != sample_keys(torch.tensor([[5.0, 3.0]]))


def test_hooks_are_gone_afterwards() -> None:
    models: list[nn.Module] = []
    clip = nn.utils.clip_grad_norm_

    def fit(watch: Any, steps: int, micro: int) -> None:
        def kept(model: nn.Module) -> nn.Module:
            models.append(model)
            return watch(model)

        kept.dtype = watch.dtype  # type: ignore[attr-defined]
        Loop(clip=0.05)(kept, steps, micro)

    random_state = torch.get_rng_state()
    audit(fit)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert nn.utils.clip_grad_norm_ is clip
    for model in models:
        assert not model._forward_pre_hooks and not model._forward_hooks
        assert not any(p._backward_hooks for p in model.parameters())
