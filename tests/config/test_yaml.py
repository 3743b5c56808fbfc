"""YAML 1.2 scalars, limits of size and depth, and every failure as one line, in files and overrides."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import yaml

from fastrlhf.config import load_config, yaml_core
from fastrlhf.config.yaml_core import YamlError, parse
from fastrlhf.errors import UserError

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("1:30.5", "1:30.5"),
        ("2026-11-30", "2026-11-30"),
        ("2026-13-45", "2026-13-45"),
        ("2026-11-30 25:61:00", "2026-11-30 25:61:00"),
        ("2026-11-30T10:00:00Z", "2026-11-30T10:00:00Z"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("010", 10),
        ("0o17", 15),
        ("0x1f", 31),
        ("-0b11", -3),
        ("+5", 5),
        ("1_000", 1000),
        ("08", 8),
        ("9" * 64, 10**64 - 1),
        ("9" * 5000, "9" * 5000),
        ("0x" + "f" * 5000, "0x" + "f" * 5000),
        ("1.5", 1.5),
        ("1.", 1.0),
        (".5", 0.5),
        ("1_000.5", 1000.5),
        ("1.0e-5", 1e-5),
        ("1e-5", "1e-5"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("=", "="),
        ("<<", "<<"),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("!!float 3", 3.0),
        ("!!float 1e5", 1e5),
        ("'true'", "true"),
        ("{1: a, true: b, 2026-11-30: c}", {"1": "a", "true": "b", "2026-11-30": "c"}),
        ("{<<: [{a: 1}, {a: 2, b: 3}], b: 4}", {"a": 1, "b": 4}),
        ("[&x {a: 1}, *x]", [{"a": 1}, {"a": 1}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, expected):
    value = parse(text)[0]
    assert value == expected and type(value) is type(expected)


def test_not_a_number():
    assert math.isnan(parse(".nan")[0])


MALFORMED = [
    ("a: &a [*a]", "an alias refers to a value that contains it"),
    ("a: &a {b: *a}", "an alias refers to a value that contains it"),
    ("a: &a {<<: *a}", "an alias refers to a value that contains it"),
    ("a: *b", "found undefined alias 'b'"),
    ("a: " + "[" * 33 + "]" * 33, "nested more than 32 levels deep"),
    ("a: " + "[" * 100_000, "nested more than 32 levels deep"),
    ("a: " + "{b: " * 5_000, "nested more than 32 levels deep"),
    ("- " * 50_000, "nested more than 32 levels deep"),
    ("? " * 50_000, "nested more than 32 levels deep"),
    (BOMB, "aliases expand to more than 50000 values"),
    (
        "a: &a " + "b" * 100_000 + "\nc: [" + "*a," * 20 + "]",
        "aliases expand to more than 1048576 characters",
    ),
    ("a: [" + "b," * 100_000 + "]", "more than 50000 values"),
    ("a: " + "b" * (1 << 20), "longer than 1048576 characters"),
    ("a: \x1b[31m", "the character U+001B is not allowed"),
    ("a: b\0", "the character U+0000 is not allowed"),
    ("a: \ud800", "the character U+D800 is not allowed"),
    ("a: !!python/object:os.system x", "the tag !!python/object:os.system is not supported"),
    ("a: !!python/name:os.system", "the tag !!python/name:os.system is not supported"),
    ("a: !!timestamp 2026-13-45", "the tag !!timestamp is not supported"),
    ("a: !!binary eA==", "the tag !!binary is not supported"),
    ("a: !!set {b}", "the tag !!set is not supported"),
    ("a: !mine b", "the tag !mine is not supported"),
    ("a: !!str [b]", "the tag !!str is not supported"),
    ("a: !!int b", "'b' is not an integer"),
    ("a: !!float b", "'b' is not a number"),
    ("a: !!bool yes", "'yes' is not a boolean"),
    ("? [a]\n: b", "a list is used as a key"),
    ("? {a: b}\n: c", "a mapping is used as a key"),
    ("? !!python/none x\n: c", "the tag !!python/none is not supported"),
    ("? \n: b", "a key is empty"),
    ("a: {b: 1, b: 2}", "a.b is already set on line 1"),
    ("a: [{b: 1, b: 2}]", "b is already set on line 1"),
    ("a: {<<: 3}", "<< expects a mapping"),
    ("a: {<<: [3]}", "<< expects a mapping"),
    ('a: "\\UFFFFFFFF"', "not valid YAML"),
    ("%YAML " + "9" * 5000 + ".1\n---\na: b", "not valid YAML"),
    ("a: b\n---\nc: d", "another document"),
    ("a: 'b", "not valid YAML"),
    ("a: b: c", "mapping values are not allowed here"),
    ("\ta: b", "cannot start any token"),
    ("a: @b", "cannot start any token"),
]


@pytest.mark.parametrize(("text", "problem"), MALFORMED, ids=[repr(t[:20]) for t, _ in MALFORMED])
def test_every_failure_is_one_line_in_files_and_overrides(text, problem, tmp_path, minimal):
    with pytest.raises(YamlError) as parsed:
        parse(text)
    assert problem in parsed.value.problem
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    start = time.process_time()
    for call in ((path, []), (minimal, [f"data.train={text}"])):
        with pytest.raises(UserError) as raised:
            load_config(*call)
        line = str(raised.value)
        assert line.isprintable() and len(line) < 600
        if "\ud800" not in text:  # a file with a surrogate is not UTF-8
            assert problem in line
    assert time.process_time() - start < 10


def test_the_line_of_a_failure(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\nb: \x07\n")
    with pytest.raises(UserError, match=rf"^{path}:2: not valid YAML: the character U\+0007"):
        load_config(path)
    path.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(UserError, match="line 2 has the byte 0xe9, which is not UTF-8"):
        load_config(path)


def test_a_device_without_an_end_is_not_read_to_it():
    with pytest.raises(UserError, match="not valid YAML: longer than 1048576 characters"):
        load_config(Path("/dev/zero"))


def test_many_mistakes_are_reported_at_once(tmp_path):
    """Looking up the nearest key of every unknown one would take minutes."""
    path = tmp_path / "x.yaml"
    path.write_text("".join(f"unknown{i}: 1\n" for i in range(20_000)))
    start = time.process_time()
    with pytest.raises(UserError, match=r"unknown0; .* \(and 20003 more mistakes\)$"):
        load_config(path)
    assert time.process_time() - start < 10


def test_an_alias_is_a_copy(tmp_path, minimal):
    """An override of one of two sections that share an anchor leaves the other alone."""
    text = minimal.read_text() + "schedule: &s {warmup_steps: 3}\n"
    path = tmp_path / "x.yaml"
    path.write_text(text + "checkpoint: {interval: 4}\n")
    assert load_config(path, ["schedule.warmup_steps=5"]).schedule.warmup_steps == 5
    value = parse("[&s {a: 1}, *s]")[0]
    assert value[0] is not value[1]


@pytest.mark.parametrize("name", ["2026-13-45", "2026-11-30", "1:30", "yes", "off", "1e5", "="])
def test_a_text_setting_gets_the_text_as_written(make, name):
    config = make(f"output_dir={name}", f"data.train=[{name}]", f"data.pretrain={{{name}: 1}}")
    assert (config.output_dir, config.data.train) == (name, [name])
    assert config.data.pretrain == {name: 1.0}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("output_dir=123", "output_dir is 123, expected a string; quote it to make it text"),
        ("output_dir=true", "output_dir is True, expected a string; quote it to make it text"),
        ("parallel.timeout_s=1:30", "parallel.timeout_s is '1:30', expected an integer"),
        ("train.max_seconds=1:30", "train.max_seconds is '1:30', expected a number"),
        ("train.seed=2026-11-30", "train.seed is '2026-11-30', expected an integer"),
        ("parallel.sequence=ja", "parallel.sequence is 'ja', expected true or false"),
        ("parallel.sequence=2", "parallel.sequence is 2, expected true or false"),
        ("parallel.sequence=[]", "parallel.sequence is [], expected true or false"),
        ("train.steps=yes", "train.steps is 'yes', expected an integer"),
    ],
)
def test_a_value_of_another_kind_is_shown_as_written(make, override, expected):
    with pytest.raises(UserError) as raised:
        make(override)
    assert str(raised.value) == f"override '{override}': {expected}"


def test_words_for_true_and_false_stay_valid_for_booleans(make):
    assert make("parallel.sequence=yes").parallel.sequence is True
    assert make("checkpoint.save=off").checkpoint.save is False
    assert make("train.seed=010").train.seed == 10
    assert make("train.seed=1_000").train.seed == 1000


def test_long_and_strange_overrides_are_shown_short(make):
    for override in ("x" * 10_000 + "=1", "train.seed=" + "9" * 5000, "train.\x1b[31m=1", "a\nb=1"):
        with pytest.raises(UserError) as raised:
            make(override)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 500


def test_pyyaml_reads_what_is_written_the_same(make):
    """Other tools read config.yaml as YAML 1.1."""
    from fastrlhf.config import dump_config

    stop = ["yes", "1e5", "010", "1:30", "2026-11-30", "0o17", "1_0", "~", "=", "<<", "true"]
    config = make(f"generation.stop={stop}")
    assert yaml.safe_load(dump_config(config))["generation"]["stop"] == stop
    assert parse(dump_config(config))[0]["generation"]["stop"] == stop


def test_limits_leave_room():
    paths = ", ".join(f"data/shard_{i:05d}.jsonl" for i in range(10_000))
    assert len(parse(f"train: [{paths}]")[0]["train"]) == 10_000
    assert yaml_core.MAX_DEPTH >= 8
