"""The report of a sweep: is accumulation equivalent to the larger batch, and what does it cost?"""

from .find import find
from .jobs import Job, Sweep, from_folder, from_store
from .publish import publish
from .report import Report, make_report
from .statistics import Verdict

__all__ = ["Job", "Report", "Sweep", "Verdict", "find", "from_folder", "from_store", "make_report", "publish"]
