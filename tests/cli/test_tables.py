from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from statecodec_cli import tables, tensor_tables
from tests.cli import documents


def text(renderables: Iterable[Any]) -> str:
    out = Console(file=io.StringIO(), width=160)
    for renderable in renderables:
        out.print(renderable)
    return out.file.getvalue()  # type: ignore[attr-defined]


def row(printed: str, *starts: str) -> list[str]:
    found = [line.split() for line in printed.splitlines() if line.split()[: len(starts)] == list(starts)]
    assert len(found) == 1, printed
    return found[0]


def test_compress_summarises_by_role_and_codec() -> None:
    printed = text(tables.compressed(documents.report()))
    assert "12.0 MB   ->  ckpt.sc.safetensors  4.00 MB   3.00x   4.00 B/param   2.0 s, 6.00 MB/s" in printed
    assert row(printed, "weight", "split") == [
        "weight",
        "split",
        "2",
        "4.00",
        "MB",
        "2.00",
        "MB",
        "2.00x",
        "2.00",
        "2.0e-06",
    ]
    assert row(printed, "weight", "raw")[-1] == "exact"
    assert row(printed, "step", "raw")[-2:] == ["4.00", "exact"]
    assert "\nstep error: update 0.91 %\nAdam update: max |u| 1.25 (exact 1.03)   cosine 0.999960   over 1" in printed
    assert "note: something to know" in printed


def test_a_file_that_grew_says_so() -> None:
    document = documents.report()
    assert "larger than the original" not in text(tables.compressed(document))
    assert "larger than the original" in text(tables.compressed(document | {"bytes": 12_000_001}))


def test_codecs_fitted_to_each_tensor_are_one_row_and_rounded_by_name() -> None:
    document = documents.report()
    for tensor, step in zip(document["tensors"], ("2.0018294210415284e-05", "0.0992692189195605"), strict=False):
        tensor |= {"codec": f"uniform(step={step},bits=8)", "error": {"step_error": 0.00998}}
    printed = text(tables.compressed(document))
    assert row(printed, "weight", "uniform(bits=8)")[2] == "2"
    assert row(printed, "weight", "uniform(bits=8)")[-2:] == ["0.998", "%"]
    assert "  step error\n" in printed
    every = text(tables.compressed(document, every=True))
    assert "uniform(step=2e-05,bits=8)" in every
    assert "uniform(step=0.0993,bits=8)" in every


def test_the_error_in_steps_is_said() -> None:
    document = documents.report() | {"total": {"u_rms": 0.00998, "weight_step_error": 0.0}, "updates": []}
    assert "\nstep error: update 0.998 %, weights exact\n" in text(tables.compressed(document))
    document |= {"total": {"weight_step_error": 0.0498}, "asked": {"u_rms": 0.05, "weight_step_error": 0.06}}
    assert "\nstep error: weights 4.98 % (asked 6 %)\n" in text(tables.compressed(document)), "SGD has no u"
    document["total"]["momentum_step_error"] = 0.0499
    line = "\nstep error: momenta 4.99 % (asked 5 %), weights 4.98 % (asked 6 %)\n"
    assert line in text(tables.compressed(document))
    document["total"]["u_rms"] = 0.047
    assert "\nstep error: update 4.7 % (asked 5 %), momenta 4.99 %" in text(tables.compressed(document))
    assert "\nstep error: update 4.7 % (asked 5 %), mom" in text(tables.verified(document, against=True))
    compared = documents.difference() | {"total": document["total"]}
    assert "\nstep error: update 4.7 %, momenta 4.99 %, weights 4.98 %\n" in text(tables.difference(compared))


def test_many_notes_are_cut() -> None:
    printed = text(tables.compressed(documents.report() | {"notes": [f"tensor {i}: kept exact" for i in range(100)]}))
    assert printed.count("kept exact") == 12
    assert "and 88 more notes; --json lists all" in printed


def test_what_is_no_tensor_is_called_so() -> None:
    document = documents.report()
    document["tensors"].append(documents.tensor("skeleton", "skeleton", "raw", 400, 40, 0.0))
    assert row(text(tables.compressed(document)), "not", "tensors")[2] == "raw"


def test_roles_come_in_the_order_people_think_in() -> None:
    document = documents.report()
    document["tensors"].reverse()
    lines = text(tables.compressed(document)).splitlines()
    table = [line.split()[0] for line in lines if line.strip() and not line.startswith("step error:")]
    roles = [word for word in table if word in tensor_tables._ROLES]
    assert roles == ["weight", "weight", "exp_avg", "exp_avg_sq", "step"]


def test_a_nan_error_is_not_hidden_by_a_larger_one() -> None:
    document = documents.report()
    document["tensors"][0]["error"]["relative_rms"] = "nan"
    assert row(text(tables.compressed(document)), "weight", "split")[-1] == "nan"
    document["tensors"][0]["error"]["relative_rms"] = math.inf
    assert row(text(tables.compressed(document)), "weight", "split")[-1] == "inf"


def test_all_lists_every_tensor_by_name() -> None:
    printed = text(tables.compressed(documents.report(), every=True))
    for tensor in documents.report()["tensors"]:
        assert row(printed, tensor["name"])


def test_inspect_of_a_plain_checkpoint_claims_no_compression() -> None:
    printed = text(tables.inspected(documents.plain()))
    assert "1,000,000 parameters" in printed
    assert "after" not in printed
    assert "ratio" not in printed
    assert row(printed, "exp_avg") == ["exp_avg", "float32", "1", "4.00", "MB"]


def test_inspect_and_verify_say_what_was_asked_for() -> None:
    document = documents.report() | {"asked": {"u_rms": 0.05, "weight_step_error": 0.05}, "preset": None}
    for printed in (tables.inspected(document), tables.verified(document, against=False)):
        assert "errors up to 5 % of a step" in text(printed)
    assert "preset" not in text(tables.inspected(documents.report()))  # an older file does not say whether it was kept


def test_verify_says_whether_the_original_is_the_very_file() -> None:
    document = documents.report()
    assert "the same SHA-256" in text(tables.verified(document, against=True))
    assert "SHA-256" not in text(tables.verified(document, against=False))
    document["source"]["sha256"] = None
    assert "intact, and within its stated errors of the original" in text(tables.verified(document, against=True))


def test_diff_states_update_error_and_what_has_no_counterpart() -> None:
    printed = text(tables.difference(documents.difference()))
    assert row(printed, "exp_avg_sq") == ["exp_avg_sq", "1", "1,000,000", "0.00900", "0.0270"]
    assert "over 1 parameter" in printed
    assert "only in b.pt: extra" in printed
    assert "identical" not in printed
    every = text(tables.difference(documents.difference(), every=True))
    assert row(every, "w.0") == ["w.0", "0.91", "%", "1.25", "1.03", "0.999960"]


def test_diff_shows_the_error_in_steps_of_every_tensor() -> None:
    document = documents.difference()
    assert "step error  max |u|" not in text(tables.difference(document)), "of no tensor it is known"
    first, second = document["tensors"][:2]
    first["step_error"], second["step_error"] = 0.0123, 0.0199
    printed = text(tables.difference(document))
    assert row(printed, "weight")[-2:] == ["1.99", "%"], "the worst of them"
    assert row(printed, "exp_avg_sq")[-1] == "0.0270"
    every = text(tables.difference(document, every=True))
    assert row(every, "model.w.0")[-2:] == ["1.23", "%"]
    second["step_error"] = "inf"
    assert row(text(tables.difference(document)), "weight")[-1] == "inf"


def test_mismatched_elements_are_shouted() -> None:
    document = documents.difference()
    document["tensors"][0]["mismatched"] = 3
    assert "3 elements are NaN or infinite on one side only" in text(tables.difference(document))


def test_integers_that_differ_are_counted_and_have_no_error() -> None:
    document = documents.difference()
    document["tensors"].append(
        documents.compared("codes", "other", "uint8") | {"differing": 12_345, "identical": False}
    )
    assert row(text(tables.difference(document)), "other")[-2:] == ["65,536", "12,345"]
    assert row(text(tables.difference(document, every=True)), "codes")[-2:] == ["uint8", "12,345"]
    assert "elements that differ" not in text(tables.difference(documents.difference()))


def test_diff_says_what_it_calls_equal() -> None:
    document = documents.difference() | {"tensors_equal": True, "identical": True, "only_in_b": []}
    assert "identical: every byte" in text(tables.difference(document))
    for tensor in document["tensors"]:
        tensor["identical"] = True
    document |= {"identical": False, "rest_differs": ["a.json", "b.json"]}
    printed = text(tables.difference(document))
    assert "every tensor is equal\n" in printed
    assert "what is not a tensor differs (settings, counters, metadata, other files): a.json, b.json" in printed
    document["tensors"][0]["identical"] = False
    assert "1 of them in other bits" in text(tables.difference(document))


def test_a_file_of_100000_tensors_prints_a_bounded_table() -> None:
    document = documents.report()
    document["tensors"] = [documents.tensor(f"t{i}", "weight", "raw", 4, 4, None) for i in range(1000)]
    printed = text(tables.compressed(document, every=True))
    assert "600 more; --json lists all" in printed
    assert len(printed.splitlines()) < 420


def test_names_are_not_read_as_markup() -> None:
    document = documents.report()
    document["tensors"][0]["name"] = "[bold]x[/wrong]"
    assert row(text(tables.compressed(document, every=True)), "[bold]x[/wrong]")
