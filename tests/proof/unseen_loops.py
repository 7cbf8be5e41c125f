"""All unseen loops: written from the interface of certify alone, without a look at how the proof works."""

from tests.proof import (
    unseen_architectures,
    unseen_backward,
    unseen_buffers,
    unseen_causes,
    unseen_clipping,
    unseen_coupled,
    unseen_cut,
    unseen_division,
    unseen_micro_batches,
    unseen_models,
    unseen_moved,
    unseen_networks,
    unseen_precision,
    unseen_random,
    unseen_right_loops,
    unseen_rows,
    unseen_scalers,
    unseen_state,
    unseen_steps,
    unseen_tokens,
)
from tests.proof.unseen_common import Case

MODULES = (
    unseen_division,
    unseen_tokens,
    unseen_micro_batches,
    unseen_steps,
    unseen_clipping,
    unseen_moved,
    unseen_cut,
    unseen_state,
    unseen_buffers,
    unseen_random,
    unseen_coupled,
    unseen_precision,
    unseen_scalers,
    unseen_right_loops,
    unseen_models,
    unseen_architectures,
    unseen_networks,
    unseen_causes,
    unseen_rows,
    unseen_backward,
)
CASES: list[Case] = [case for module in MODULES for case in module.BOOK]
