"""A certificate as one HTML page, with JSON beside it: pictures embedded, nothing loaded, no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import __version__
from ..config.loading import flatten
from ..proof import Certificate
from ..proof.certificate import number
from ..tracking.run_folder import RunFolder
from .show import explained, failed_first, mark, passed_checks, question, reasons


def save(certificate: Certificate, folder: RunFolder) -> None:
    """Writes the certificate's JSON, page and pictures into `folder`, which is made if it is not there."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.certificate.write_text(certificate.as_json())
    pictures: Mapping[str, Path] = {}
    if certificate.series or certificate.counts:
        from .pictures import draw  # loads matplotlib

        pictures = draw(certificate, folder.certificate_pictures)
    for name in folder.certificate_pictures.keys() - pictures.keys():
        folder.certificate_pictures[name].unlink(missing_ok=True)  # of an earlier certificate
    folder.certificate_page.write_text(page(certificate, pictures), encoding="utf-8")


def page(certificate: Certificate, pictures: Mapping[str, Path]) -> str:
    """Renders the page with the PNG files of `pictures.draw`, by their names."""
    environment = Environment(
        loader=PackageLoader("accumexp", "prove"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("certificate.html.j2").render(
        certificate=certificate,
        question=question(certificate.subject) or "Certificate",
        reasons=[(line, explained(cause)) for line, cause in reasons(certificate)],
        passed_checks=passed_checks(certificate),
        checks=[(check, mark(check)) for check in failed_first(certificate)],
        pictures={name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()},
        tables={
            "What was certified": _entries(certificate.subject),
            "Environment": [*_entries(certificate.environment), ("page", f"accumexp {__version__}")],
        },
        config=_entries(certificate.config),
        number=number,
    )


def _entries(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(flatten(values)) if values else []
