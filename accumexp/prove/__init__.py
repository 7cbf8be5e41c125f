"""The command `python -m accumexp.prove`: the certificate of an experiment.

`save_certificate` keeps the certificate of any loop, made by `accumexp.proof.certify`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..proof import Certificate


def save_certificate(certificate: Certificate, folder: str | Path) -> Path:
    """Writes `certificate.json`, `certificate.html` and its pictures into `folder`, which is made if needed.

    Returns:
        The path of the page, which loads nothing and can be sent alone.

    Raises:
        OSError: if the folder cannot be written.
    """
    # Imported here, because the command imports this package before it answers --help.
    from ..tracking.run_folder import RunFolder
    from .page import save

    run_folder = RunFolder(Path(folder))
    save(certificate, run_folder)
    return run_folder.certificate_page
