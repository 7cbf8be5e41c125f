"""The truth of plain loops that are right, and of plain loops with one fault each."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.audit.larger_batch import Task, Watch, find_truth

SAMPLES, STEPS, MICRO = 84, 4, 8  # an epoch: two full windows, then micro-batches of 8, 8 and 4

torch.manual_seed(1)
X = torch.randn(SAMPLES, 5, dtype=torch.float64)
Y = torch.randint(3, (SAMPLES,))
SENTENCES = [torch.randint(1, 11, (2 + index * 7 % 9,)) for index in range(SAMPLES)]
LABELS = [sentence.masked_fill(torch.arange(len(sentence)) < 1, -100) for sentence in SENTENCES]


def pad(rows, value):
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def classes(**options):
    return Task(
        list(X), lambda model, held: functional.cross_entropy(model(X[held]), Y[held]), epochs=2, **options
    )


def tokens(**options):
    def loss(model, held):
        logits = model(pad([SENTENCES[index] for index in held], 0))
        labels = pad([LABELS[index] for index in held], -100)
        return functional.cross_entropy(logits.transpose(1, 2), labels)

    return Task(SENTENCES, loss, epochs=2, **options)


def train(
    watch: Watch,
    steps: int,
    micro: int,
    *,
    fault: str = "",
    clip: float | None = None,
    closure: bool = False,
    ragged: bool = False,
):
    """Classes by default, tokens where `ragged`; each micro-batch weighs its share of the window."""
    layers = (
        [nn.Embedding(11, 6), nn.Linear(6, 11)] if ragged else [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)]
    )
    model = watch(nn.Sequential(*layers).to(watch.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 / (number + 1))

    def weigh(part) -> int:
        return sum(int((LABELS[index] != -100).sum()) for index in part) if ragged else len(part)

    def mean(part):
        if ragged:
            logits = model(pad([SENTENCES[index] for index in part], 0)).transpose(1, 2)
            return functional.cross_entropy(logits, pad([LABELS[index] for index in part], -100))
        return functional.cross_entropy(model(X[part]), Y[part])

    def clip_norm():
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)

    for _ in range(2):
        parts = [list(range(start, min(start + micro, SAMPLES))) for start in range(0, SAMPLES, micro)]
        for first in range(0, len(parts), steps):
            window = parts[first : first + steps]
            if fault == "last window dropped" and len(window) < steps:
                continue
            total = sum(weigh(part) for part in window)

            def backward(window=window, total=total):
                for part in window[: 1 if fault == "one micro-batch" else None]:
                    weight = weigh(part) / total
                    if fault == "not divided":
                        weight = 1.0
                    elif fault == "mean of means":
                        weight = 1 / len(window)
                    elif fault == "divided by steps":
                        weight = 1 / steps
                    loss = mean(part) * weight
                    loss.backward()
                    if fault == "clipped by micro-batch":
                        clip_norm()
                if fault != "clipped by micro-batch":
                    clip_norm()

            if closure:
                optimizer.step(lambda run=backward: run() or 0.0)
            else:
                backward()
                optimizer.step()
            if fault == "steps twice":
                optimizer.step()
            if fault != "not zeroed":
                optimizer.zero_grad()
            for _ in range(steps if fault == "schedule by micro-batch" else 1):
                schedule.step()


RATES = [[0.1 / (number + 1)] for number in range(6)]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize("closure", [False, True])
def test_a_right_loop_is_equal(steps, closure):
    for task, ragged in ((classes(), False), (tokens(), True)):
        truth = find_truth(
            lambda *given, ragged=ragged: train(*given, ragged=ragged, closure=closure), task, steps, MICRO
        )
        assert truth.equal, str(truth)
        assert all(update.in_order for update in truth.updates)


def test_a_right_loop_that_clips_and_schedules_is_equal():
    task = classes(clip_norm=0.1, rates=RATES)
    assert find_truth(lambda *given: train(*given, clip=0.1), task, STEPS, MICRO).equal


@pytest.mark.parametrize(
    ("fault", "ragged", "wrong"),
    [
        ("not divided", False, [1, 2, 3, 4, 5, 6]),
        ("not divided", True, [1, 2, 3, 4, 5, 6]),
        ("mean of means", False, [3, 6]),
        ("mean of means", True, [1, 2, 3, 4, 5, 6]),
        ("divided by steps", False, [3, 6]),
        ("one micro-batch", False, [1, 2, 3, 4, 5, 6]),
        ("clipped by micro-batch", False, [1, 2, 3, 4, 5, 6]),
        ("not zeroed", False, [2, 3, 4, 5, 6]),
    ],
)
def test_a_wrong_gradient_is_found_in_its_updates(fault, ragged, wrong):
    clip = 0.1 if fault.startswith("clipped") else None
    task = tokens() if ragged else classes(clip_norm=clip)
    truth = find_truth(
        lambda *given: train(*given, fault=fault, clip=clip, ragged=ragged), task, STEPS, MICRO
    )
    assert [update.number for update in truth.updates if update.difference > truth.bound] == wrong
    assert not truth.equal and "gradient wrong" in str(truth)


def test_the_factor_of_a_gradient_that_is_not_divided_is_told():
    truth = find_truth(lambda *given: train(*given, fault="not divided"), classes(), STEPS, MICRO)
    assert truth.updates[0].held == [8, 8, 8, 8] and truth.updates[0].ratio == pytest.approx(4)


@pytest.mark.parametrize(("fault", "made"), [("last window dropped", 4), ("steps twice", 12)])
def test_updates_made_are_held_against_those_due(fault, made):
    truth = find_truth(lambda *given: train(*given, fault=fault), classes(), STEPS, MICRO)
    assert (truth.made, truth.due, truth.equal) == (made, 6, False)
    assert f"{made} updates, 6 due" in str(truth)


def test_a_schedule_that_steps_by_micro_batch_is_found():
    truth = find_truth(
        lambda *given: train(*given, fault="schedule by micro-batch"), classes(rates=RATES), STEPS, MICRO
    )
    assert not truth.equal and "learning rate of update 2" in str(truth)


def test_an_optimizer_of_other_parameters_is_refused():
    def fit(watch, steps, micro):
        model = watch(nn.Linear(5, 3).double())
        model(X[:4]).sum().backward()
        torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1).step()

    with pytest.raises(RuntimeError, match="parameters"):
        find_truth(fit, classes(), STEPS, MICRO)
