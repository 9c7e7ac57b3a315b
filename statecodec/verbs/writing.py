"""Writing a compressed checkpoint, as `compress`, `convert` and `save` share it: append, finish, verify, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from statecodec.checkpoint.report import Report
from statecodec.checkpoint.stored import StoredCheckpoint
from statecodec.format import ItemSpec, Written
from statecodec.suffixes import TORCH_SUFFIXES
from statecodec.verbs.appending import Encoder, ErrorRules, Fallback, WriteOptions, appended, exactly


@dataclass(frozen=True)
class Outcome:
    """What was written, and which items are stored exactly because their codec refused them (name -> reason)."""

    written: Written
    refusals: Mapping[str, str]
    checked: Report
    """Of the finished output, before it was published."""

    def report(self, output: WriteOptions) -> Report:
        """The report, under the names that the output has now."""
        written = self.written
        shown = output.target.with_name(written.path.name) if len(written.files) > 1 else output.target
        notes = (*self.checked.notes, *written.notes)
        if output.target.name.lower().endswith(TORCH_SUFFIXES):
            notes += (f"{output.target.name} is a compressed file whatever its name: `restore` gives a torch file",)
        return replace(self.checked, path=str(shown), files=tuple(str(f) for f in written.files), notes=notes)


Document = Callable[[Mapping[str, str]], Mapping[str, Any]]  # refusals -> the document's JSON
Verification = Callable[[StoredCheckpoint], Report]
"""The finished output, not published yet -> its report; raises if it must not be published."""


def write(
    output: WriteOptions,
    items: Sequence[ItemSpec],
    encode: Encoder,
    document: Document,
    stage: str,
    *,
    fallback: Fallback = exactly,
    verification: Verification | None = None,
    errors: ErrorRules | None = None,
) -> Outcome:
    """Write all items. `document` is called once everything is encoded, before the manifest is written.

    `verification` reads the finished output before it is published; if it raises, the target stays as it was. `errors`
    says what is stored of an item's error sums, and whether they are small enough. Raises what `encode`, `document` and
    `verification` raise, OutputExists, OutputFailed, UsageError.
    """
    with appended(output, items, encode, stage, fallback=fallback, errors=errors) as (writer, refusals):
        finished = writer.finish(document(refusals))
        with StoredCheckpoint.of(finished.reader, beside=output.target.parent) as stored:
            checked = stored.report() if verification is None else verification(stored)
        return Outcome(finished.publish(), refusals, checked)
