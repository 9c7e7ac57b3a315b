"""The documentation is complete: routes, settings, codes. `python tests/server/test_docs.py` writes the tables."""

import json
import re
from pathlib import Path

from statecodec_server import problems
from statecodec_server.settings import Settings

ROOT = Path(__file__).parents[2]
SERVICE, HTTP = ROOT / "docs" / "service.md", ROOT / "docs" / "http.md"


def settings_table():
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=False)
        if isinstance(default, int) and not isinstance(default, bool):
            default = int(default)  # a ByteSize is shown as the number it is
        shown = "" if field.default_factory or default is None else f"`{default}`"
        assert field.description, f"{name} has no description"
        lines.append(f"| `{name}` | {shown} | {field.description} |")
    return "\n".join(lines)


def codes():
    """The table in the module's docstring, where it is maintained."""
    return re.findall(r"^    ([a-z_.]+(?:, [a-z_.]+)*)\s{2,}(?:(\d{3})\s+)?(.*)$", problems.__doc__, re.MULTILINE)


def codes_table():
    lines = ["| code | status | when |", "| --- | --- | --- |"]
    for names, status, meaning in codes():
        if names != "code":
            lines.append(f"| {', '.join(f'`{name}`' for name in names.split(', '))} | {status} | {meaning} |")
    return "\n".join(lines)


def between(text, mark, table):
    before, rest = text.split(f"<!-- {mark}: begin -->")
    return f"{before}<!-- {mark}: begin -->\n{table}\n<!-- {mark}: end -->{rest.split(f'<!-- {mark}: end -->')[1]}"


def test_every_setting_is_documented():
    text = SERVICE.read_text()
    assert between(text, "settings", settings_table()) == text, "run: python tests/server/test_docs.py"


def test_every_code_is_documented():
    text = HTTP.read_text()
    assert between(text, "codes", codes_table()) == text, "run: python tests/server/test_docs.py"


def test_every_code_that_is_raised_is_in_the_table():
    listed = {name for names, *_ in codes() for name in names.split(", ")}
    raised = set()
    for path in (ROOT / "server" / "statecodec_server").rglob("*.py"):
        raised |= set(
            re.findall(r'(?:HTTPProblem\(\s*\d+|ChildFailed\(|unauthorised\()[,\s]*"([a-z_.]+)"', path.read_text())
        )
    assert raised
    assert raised <= listed


def test_every_route_is_documented(client):
    text = HTTP.read_text()
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in text, (method, path)


def test_the_fault_table_came_out_of_a_campaign():
    kept = json.loads((ROOT / "benchmarks" / "results" / "service_faults.json").read_text())
    assert kept["faults"][0]["times"] >= 200
    for row in kept["faults"]:
        assert row["right"] == row["times"]
        assert f"| {row['fault']} | {row['times']} |" in SERVICE.read_text()


if __name__ == "__main__":
    SERVICE.write_text(between(SERVICE.read_text(), "settings", settings_table()))
    HTTP.write_text(between(HTTP.read_text(), "codes", codes_table()))
