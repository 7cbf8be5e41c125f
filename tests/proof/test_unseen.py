"""Loops by a reader who had not seen the proof: wrong ones are caught and explained, right ones proved."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from accumexp.proof import Certificate, certify
from accumexp.proof.evidence import all_updates_in_words

from .unseen_common import Counts
from .unseen_loops import CASES, Case

# Words of the cause, by case: of every kind a few, which run at every push.
WORDS = {
    "never_divided": "4 times the larger batch's",
    "divided_by_steps_when_fewer": "3 micro-batches divided by 4, in updates 3",
    "first_not_divided": "micro-batch 0 counts 4 times instead of once",
    "second_group_not_divided": "the gradient of parameter group 1 is 4 times the larger batch's",
    "head_bias_divided_twice": "the gradient of head.bias is 0.25 times the larger batch's",
    "token_mean_of_means": "your loss averages over 64 valid targets (those other than -100), not 16 samples",
    "padding_counted": "divided by all 112 targets, where 64 count",
    "whole_number_of_parts": "as if divided by 12 where 15 samples count, in update 6",
    "counted_before_the_shift": "divided by 64 valid targets (those other than -100), where what counts is",
    "cached_count": "in others): divided by 66, the weight of update 2's window, where 50 count",
    "mean_of_sentences": "its samples count alike, whatever they weigh in the loss",
    "ctc_by_all_lengths": "its samples count by weights among the targets, whose sum is 17, not alike",
    "boxes_of_the_micro_batch": "adds means over 12 samples and over the 18 elements of a mask",
    "sparse_not_divided": "16 times the larger batch's: not divided by the 16 samples",
    "only_the_head_by_micro_batch": "only head runs by micro-batch, 4 times on at most 6 samples",
    "log_of_the_third_update": "in update 3: the last micro-batch's; it is wrong in updates 3, 6",
    "zeroed_after_the_first": "micro-batch 0 of 4 does not count, from update 2 on",
    "body_from_the_last_alone": "body.weight, body.bias: only the last micro-batch of 4 counts",
    "skipped_when_easy": "does not count; other ones in other updates: micro-batch 1, 2, 3 in update 5",
    "step_at_half_time": "the optimizer steps 2 times in the window: after micro-batch 2, 4 of 4",
    "step_too_early": "the optimizer steps after 3 of 4 micro-batches",
    "carried_over_the_epoch": "the gradient of the window before is still in it",
    "one_bias_kept_once": "what .grad of head.bias held when the window began, in update 3",
    "schedule_by_micro_batch": "the schedule is stepped",
    "momentum_thrown_away": "the optimizer's momentum_buffer is changed or lost beside its steps",
    "norm_by_micro_batch": "clipped by norm (to 0.1) in every micro-batch",
    "value_by_micro_batch": "clipped by value (to 0.02) in every micro-batch",
    "clipped_one_by_one": "each parameter is clipped by its own norm",
    "l2_by_micro_batch": "0.02 in each of 4 micro-batches",
    "decay_of_one_weight": "the gradient of head.weight: 0.05 times the parameters",
    "shrunk_by_micro_batch": "multiplied by 0.999, before micro-batch 1, 2, 3",
    "adaptive_by_micro_batch": "changed by transform_gradient in every micro-batch",
    "average_twice_from_update_3": "from update 3 on",
    "mean_by_micro_batch_later": "buffer mean is not what one pass over the whole batch makes of it",
    "whole_batch": "steps=4 asked, 1 made",
    "whole_batch_later": "off in update 4: steps=4 asked, 1 made, first in update 3 (1 made of 18 samples)",
    "state_of_the_generator_restored": "draw what another one of their window has drawn, from update 2 on",
    "body_summed_in_bf16_later": "most at body.weight",
    "log_of_the_last": "the last micro-batch's",
    "contrast_within_micro_batches": "couples samples",
    "rounded_weights": "each of 3 micro-batches counts 0.33 where 0.333333 is due, as weights rounded to 2",
    "half_rate_for_the_biases": "group 1 is 0.5 times the optimizer's own, from update 4 on: 0.01",
    "schedule_twice_after_the_epoch": "stepped 2 times after update 3 (a window of 18 of 24 samples)",
    "weight_clamped": "in every update, by 0.0931 of their norm in update 1: no element is larger than 0.2",
    "not_brought_back": "in every update: those that perturb= moved are not moved back before the step",
    "l1_divided": "is in the gradient, 0.01 is asked for: divided by 4",
    "hook_clamps_by_micro_batch": "(to 0.01) in every micro-batch, where nothing is to be clipped",
    "mean_of_the_first_micro_batch": "is the first micro-batch's, of 6 of 24 samples, which the others",
    "mixed_under_autocast_every_third": "in updates 3, 6: off by",
    "overflow_ignored": "in any micro-batch does not skip the window: it changes all 4 parameters",
    "overflow_hidden": "an overflow in micro-batch 0, 1 or 2 does not skip the window",
    "new_scaler_every_window": "the loss scale never moves",
    "gradient_of_the_window_before": "that of the window before: this window's does not count, from update 2",
    "gradient_two_windows_late": "a loop that has just begun is right on this window",
    "dropout_in_the_first_alone": "the model is in eval mode in micro-batch 1, 2, 3, not in the others",
    "hardest_of_each_micro_batch": "loss (half_of_the_largest): couples samples",
    "frequencies_of_each_micro_batch": "(by_frequency) of 24 samples is not the mean of its micro-batches'",
    "slopes_of_each_micro_batch": "of 24 samples is not the mean of its micro-batches'",
    "tied_weight_divided_by_module": "divided by 64 items twice",
    "unscaled_after_every_micro_batch": "each one multiplies what .grad holds by 0.0625",
    "inputs_with_a_gradient": "the larger batch gives net.body.weight, net.body.bias no gradient",
    "mask_of_each_micro_batch": "elements of a mask among the outputs, not 24 samples",
    "mean_of_packed_tokens": "micro-batches count alike, though they weigh",
    "mean_of_judged_pairs": "micro-batches count alike, though they weigh (5, 5, 4, 5)",
    "last_sample_hidden_by_clamping": "samples: off by 1 instead of 0",
    "tokens_so_far": "each one is divided by the weight of those up to it",
    "moving_average_of_gradients": "a moving average, in which each one's mean has a weight of 0.3",
    "unscaled_by_1024_each_time": "each one multiplies what .grad holds by 0.0009766",
    "root_of_each_micro_batch": "it is computed on each micro-batch's samples, not on the window's",
    "words_scaled_by_frequency": "scale_grad_by_freq=True in embed (Embedding)",
    "gradient_normalised_in_backward": "couples samples: the gradient of body.weight, body.bias on the batch",
    "factors_in_turn": "the gradient of a: micro-batch 1, 3 of 4 does not count",
    "second_head_every_other_time": "of second.weight, second.bias micro-batch 1, 3 of 4 does not count",
    "second_head_detached_later": "micro-batch 1, 2, 3 delivers is not that of its samples, as others' is",
    "inputs_in_one_buffer": "the inputs of micro-batch 0, 1, 2 are overwritten before its backward pass",
    "rows_overwritten": "delivers its own gradient: the fault is in what the loop makes of it",
    "penalty_in_the_last_alone": "of micro-batch 0, 1, 2 does not count, and that of the others 4 times",
    "queue_filled_by_micro_batch": "changes state queue.keys within the window, before micro-batch 1, 2, 3",
    "stops_when_the_loss_is_large": "never seen, in a window of the batch's samples in another order",
    "hidden_state_kept_in_the_window": "the model's outputs in micro-batch 1, 2, 3 are not those on",
}
BY_NAME = {case.name: case for case in CASES}


# The loops are as people write them, and torch warns of some.
pytestmark = pytest.mark.filterwarnings("default")


def certified(case: Case, updates: int = 20) -> Certificate:
    return certify(**{**case.make(), "updates": updates})


def only_memory(certificate: Certificate) -> bool:
    return {check.about for check in certificate.failed} == {"memory"} and not certificate.causes


@pytest.mark.parametrize("name", WORDS)
def test_the_cause_of_a_wrong_loop_is_told(name: str) -> None:
    certificate = certified(BY_NAME[name], updates=6)
    assert not certificate.proved
    assert WORDS[name] in certificate.lines[0]


def test_the_updates_in_which_a_cause_holds_are_told() -> None:
    assert all_updates_in_words([1, 2], [1, 2]) == "in every update"
    assert all_updates_in_words([1], [1]) == "in update 1"
    assert all_updates_in_words([2, 3], [1, 2, 3]) == "from update 2 on"
    assert all_updates_in_words([3], range(1, 5), {3: "9 of 12 samples"}) == (
        "in update 3 (a window of 9 of 12 samples)"
    )
    assert all_updates_in_words([2, 3], range(1, 5), {3: "9 of 12 samples"}) == "in updates 2, 3"


def test_equal_rates_do_not_tell_after_which_update_the_schedule_is_stepped_twice() -> None:
    def falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.StepLR:
        return torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)

    updates = Counts()

    def train_window(model, optimizer, batch, steps, schedule):
        for inputs, targets in zip(batch[0].chunk(steps), batch[1].chunk(steps), strict=True):
            (cross_entropy(model(inputs), targets) / steps).backward()
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(2 if updates(model) == 2 else 1):
            schedule.step()

    batch = torch.randn(8, 3), torch.arange(8) % 2
    options = {"scheduler": falling, "drop_last": True, "updates": 6}
    line = str(certify(train_window, torch.nn.Linear(3, 2), cross_entropy, batch, 2, **options))
    assert "the learning rate is 0.5 times the schedule's, in update 4: 0.05 where" in line


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(CASES)
    assert BY_NAME.keys() >= WORDS.keys()


def test_samples_are_coupled_by_their_targets_alone_only_where_these_change_the_loss() -> None:
    assert "by their targets alone" not in str(certified(BY_NAME["declared_half_of_the_largest"], updates=2))


@pytest.mark.parametrize(
    "name", ["warm_up_kept", "last_doubled", "weights_of_a_copy", "last_micro_batch_not_scaled"]
)
def test_what_follows_from_the_first_cause_is_no_line_of_its_own(name: str) -> None:
    certificate = certified(BY_NAME[name], updates=6)
    assert not certificate.proved and len(certificate.lines) == 1


def test_parameters_that_are_clipped_together_are_told_by_their_norm() -> None:
    lines = certified(BY_NAME["only_the_head_clipped"], updates=2).lines
    assert "head.weight, head.bias is clipped by its own norm, not by that of all parameters" in lines[1]


def test_a_fault_in_every_third_update_is_none_of_smaller_windows() -> None:
    text = str(certified(BY_NAME["third_update_twice"], updates=13))
    assert text.endswith("at the end of the window, in updates 3, 6, 9, 12")
    text = str(certified(BY_NAME["l2_forgotten_in_small_windows"], updates=13))
    assert text.endswith("in updates 3, 6, 9, 13 (update 3: a window of 18 of 24 samples)")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.wrong], ids=lambda case: case.name)
def test_no_wrong_loop_is_proved(case: Case) -> None:
    certificate = certified(case)
    assert not certificate.proved
    assert certificate.causes or certificate.failed[0].about != "update" or "samples" in str(certificate)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not case.wrong], ids=lambda case: case.name)
def test_no_right_loop_is_refused(case: Case) -> None:
    certificate = certified(case)
    if case.kind == "memory":
        assert only_memory(certificate)
    elif case.kind in ("dropout", "draws"):
        assert certificate.verdict == "proved up to"
    else:
        assert certificate.proved, str(certificate)
