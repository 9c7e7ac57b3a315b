"""Exit codes, stdout against stderr, and --json for errors; a stand-in fails where failing is the point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from statecodec.errors import CorruptFile, UsageError
from statecodec_cli import main as cli_main
from statecodec_cli.verbs import codecs
from tests.cli.run import ROOT, Cli, finished


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def describe(codec: object) -> None:
        raise error

    monkeypatch.setattr(codecs, "_describe", describe)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["compress"], "Missing argument"),
        (["compress", "nowhere.pt"], "does not exist."),
        (["inspect", "s3://bucket/ckpt.pt"], "URLs are not opened: give a file, a directory, or - for standard input"),
        (["compress", __file__, "--preset", "enormous"], "enormous"),
        (["compress", __file__, "--threads", "0"], "--threads"),
        (["inspect", __file__, "--plot", "x.pdf"], "must end in .svg or .png"),
        (["nonsense"], "nonsense"),
        (["codecs", "--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_call_is_exit_2_on_stderr(cli: Cli, words: list[str], complaint: str) -> None:
    done = cli(*words)
    assert (done.code, done.out) == (2, "")
    assert complaint in " ".join(done.err.split())
    as_json = cli(*words, "--json")
    assert as_json.code == 2
    assert as_json.json()["error"]["code"] == "usage"
    assert complaint in as_json.json()["error"]["message"]


def test_a_library_error_is_exit_1_with_its_code(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, CorruptFile("chunk 3 of 'w' has another checksum"))
    done = cli("codecs")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error: chunk 3 of 'w' has another checksum  [format.corrupt]\n"
    assert cli("codecs", "--json").json() == {
        "error": {"code": "format.corrupt", "message": "chunk 3 of 'w' has another checksum"}
    }


def test_the_librarys_usage_error_is_exit_2(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, UsageError("no"))
    assert cli("codecs").code == 2


def test_an_operating_system_error_is_exit_1_and_names_the_file(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, PermissionError(13, "Permission denied", "ckpt.pt"))
    done = cli("codecs", "--json")
    assert done.code == 1
    assert done.json() == {"error": {"code": "io", "message": "ckpt.pt: Permission denied"}}


def test_a_bug_is_not_dressed_up(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli("codecs")


def test_interruption_is_130_and_the_old_handlers_come_back(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    raising(monkeypatch, KeyboardInterrupt())
    assert cli("codecs").code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_and_sets_the_code(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    unwound = []

    def describe(codec: object) -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            unwound.append(number)

    monkeypatch.setattr(codecs, "_describe", describe)
    done = cli("codecs", "--json")
    assert (done.code, done.out, unwound) == (code, "", [number])


def test_every_verb_has_help_and_json_and_one_line_to_be_listed_with(cli: Cli) -> None:
    listed = cli("--help").out
    for verb, run in cli_main.VERBS.items():
        assert (run.__doc__ or "").strip()
        assert f" {verb} " in listed
        done = cli(verb, "--help")
        assert done.code == 0
        assert ("--json" in done.out) == (verb not in ("serve", "worker"))  # these two run until they are stopped


@pytest.mark.parametrize("verb", cli_main.VERBS)
def test_help_is_in_the_words_of_its_users(cli: Cli, verb: str) -> None:
    usage, *rest = cli(verb, "--help").out.splitlines()
    assert not set("{}<>") & set(usage)
    assert "...." not in usage
    shown = "\n".join(rest)
    for ours in ("<Path>", "<list", "<int", "<float", "<bool", "<str", "<text", "range>"):
        assert ours not in shown


def test_no_arguments_show_the_help(cli: Cli) -> None:
    done = cli()
    assert "compress" in done.out + done.err
    assert done.code == 2


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("statecodec 0.")


def test_codecs_are_written_as_they_are_parsed(cli: Cli) -> None:
    from statecodec.codecs import Encoding, names, parse

    document = cli("codecs", "--json").json()
    assert [codec["name"] for codec in document["codecs"]] == names()
    for codec in document["codecs"]:
        fields = ",".join(f"{name}={value}" for name, value in codec["fields"].items())
        assert parse(f"{codec['name']}({fields})") == parse(codec["name"])
        assert codec["summary"]
    assert [change["name"] for change in document["changes"]] == ["delta", "residual"]
    for change in document["changes"]:
        assert all(str(Encoding.parse(f"{change['name']}(inner={codec})")) for codec in change["inner"])
    assert list(document["presets"]) == ["lossless", "resume", "small", "tiny", "live", "weights"]


def test_presets_of_the_option_are_those_of_the_library() -> None:
    from typing import get_args

    from statecodec.choose import PRESETS
    from statecodec_cli.verbs.compress import Preset

    assert list(get_args(Preset)) == list(PRESETS)


def test_a_reader_that_left_is_no_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "statecodec_cli", "codecs", "--json"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_real_process_keeps_data_and_messages_apart(tmp_path: Path) -> None:
    done = finished("codecs", "--json", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["codecs"]
    refused = finished("inspect", "nowhere", cwd=tmp_path)
    assert (refused.code, refused.out) == (2, "")
