"""What the numbers of a report are: a sentence each, with its source, in HTML."""

from __future__ import annotations

from html import escape

from .analysis import Report
from .certificates import has_certificates
from .trajectory import EARLY, JUMP


def explanations(report: Report) -> list[str]:
    """One entry for each kind of number that the report shows."""
    config, measure = report.config, report.measure
    percent, error = f"{config.confidence:.0%}", f"{1 - config.confidence:.0%}"
    margin = "the margin" if report.margin is None else escape(measure.amount(report.margin))
    lines = [
        f"<b>{escape(measure.name)}</b>: mean and standard deviation over the seeds, of the "
        "model at the end of the run, on the test split.",
        "<b>Difference</b>: mean over the seeds of this group's value minus the reference's "
        "with the same seed (same first weights, same order of samples), with Student's "
        f"{percent} interval of that mean, for each comparison by itself. (p below does not look "
        "at this interval: two one-sided tests are an interval of its own level.)",
        "<b>Reference</b>: of the groups that differ only in how the window is cut, the one "
        "with the fewest micro-batches: the larger batch itself, if one is among them.",
        f"<b>p</b>: the chance to see such data if the true difference were {margin} or more, by "
        "two one-sided paired t-tests (Schuirmann 1987, doi:10.1007/BF01068419), corrected for "
        "the number of comparisons by Holm's method (1979, Scandinavian Journal of Statistics "
        "6).",
        f"<b>Equivalent</b>: p is below {error}, and the training is the reference's up to "
        "rounding, or does not claim to be.",
        f"<b>Different</b>: there is a difference (paired t-test, Holm, {error}) that is not "
        "shown to be inside the margin (Lakens 2017, doi:10.1177/1948550617697177), or the "
        "training leaves the reference's by more than rounding.",
        "<b>Undecided</b>: neither is shown. The number of seeds that would decide is that with "
        f"which the test has {config.power:.0%} power if there is no difference and the spread "
        "stays as it is (Phillips 1990, doi:10.1007/BF01063556).",
        "<b>Training</b>: the window's loss beside the reference's from the first update on. "
        "Rounding makes them differ by at most about 8 * sqrt(batch size) * u, u half the "
        "precision's epsilon (Higham and Mary 2019, doi:10.1137/18M1226312), until it has had "
        f"time to grow. Beyond that within the first {EARLY} updates, or by a jump of a factor of "
        f"{JUMP:g} in most seeds at the same update, is another computation. Later the losses of "
        "equal trainings part too. That is chaos, which only the statistics above can judge. A bug "
        "whose effect is smaller than rounding, or comes later, is not seen here.",
        "<b>ms/update, samples/s</b>: medians over the runs, without evaluation and "
        "checkpoints; in brackets the ratio to the reference.",
        "<b>Activations</b>: what autograd saves for backward in one window, at its highest. "
        "<b>Peak memory</b>: what was allocated on a GPU, or the resident set of the whole "
        "process on a CPU.",
    ]
    if has_certificates(report):
        lines.append(
            "<b>Certificate</b>: what a run has found of its own window. <i>Proved</i>: its update is that "
            "of the same batch in one piece, up to rounding. <i>Proved up to</i> a source: so it is, but for "
            "what that adds. <i>Not proved</i>: it is not, for the causes that are named. It says nothing of "
            "accuracy, and the verdict says nothing of it. <i>Proved 3 of 5</i> counts the runs that are "
            "proved outright."
        )
    if report.noise:
        lines.append(
            "<b>Gradient noise scale</b>: the trace of the gradient's covariance over samples, "
            "divided by the square of the gradient (McCandlish et al. 2018, arXiv:1812.06162): "
            "the batch in which the noise of the gradient is as large as the gradient. A batch "
            "of B takes 1 + B / scale times the fewest samples and 1 + scale / B times the "
            "fewest updates."
        )
    return lines
