"""The table of operations: it fits the library, its checks and its schemas say the same."""

import inspect
import json
import subprocess
import sys

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import statecodec
from statecodec.choose import PRESETS
from statecodec.errors import UsageError
from statecodec.operations import OPERATIONS, Option
from statecodec.operations import PRESETS as NAMED

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**7), st.floats(), st.text(max_size=12),
    st.sampled_from(["small", "zstd:3", "none", "5GB", "10 MiB", "0B", "*.w=raw", "=", "a=", "foam"]),
    st.lists(st.sampled_from(["*.w=raw", "=raw", "x", "", 3, "y" * 501]), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
OPTIONS = {f"{row.name}.{option.name}": option for row in OPERATIONS.values() for option in row.options}


def test_every_row_is_a_function_and_every_option_one_of_its_keywords():
    for row in OPERATIONS.values():
        parameters = inspect.signature(getattr(statecodec, row.name)).parameters
        for option in row.options:
            assert option.name in parameters, (row.name, option.name)
            default = parameters[option.name].default
            if not option.needed:
                assert default == option.default, (row.name, option.name)
        if row.name != "restore" and row.other:
            assert row.other in parameters


def test_the_presets_are_those_of_the_library():
    assert list(NAMED) == list(PRESETS)


def test_reading_the_table_imports_no_torch():
    code = "import sys, statecodec.operations; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


@pytest.mark.parametrize("name", OPTIONS)
@given(value=VALUES)
def test_the_schema_accepts_what_the_check_accepts(name, value):
    option: Option = OPTIONS[name]
    accepted = True
    try:
        option.accepted(value)
    except UsageError:
        accepted = False
    if value != value:  # NaN: JSON has none
        assert not accepted
        return
    json.dumps(option.schema())
    assert accepted is jsonschema.Draft202012Validator(option.schema()).is_valid(value)


def test_an_unknown_or_missing_option_is_named():
    with pytest.raises(UsageError, match="compress has no option 'presets'; there are preset, rules"):
        OPERATIONS["compress"].accepted({"presets": "small"})
    with pytest.raises(UsageError, match="inspect has no option 'preset'"):
        OPERATIONS["inspect"].accepted({"preset": "small"})
    with pytest.raises(UsageError, match="convert needs to"):
        OPERATIONS["convert"].accepted({})
    with pytest.raises(UsageError, match="convert needs to or layout, one of them"):
        OPERATIONS["convert"].accepted({"to": ["foam"], "layout": "dcp"})
    schema = jsonschema.Draft202012Validator(OPERATIONS["convert"].schema())
    for chosen, fits in (
        ({}, 0),
        ({"to": ["foam"]}, 1),
        ({"layout": "dcp"}, 1),
        ({"to": ["foam"], "layout": "dcp"}, 0),
    ):
        assert schema.is_valid(chosen) is bool(fits)
    assert OPERATIONS["compress"].accepted({"preset": None, "max_update_error": 0.5}) == {"max_update_error": 0.5}
