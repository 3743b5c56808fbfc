"""`fastrlhf doctor` reports what works and what does not, by trying it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fastrlhf.commands import doctor


@pytest.fixture(scope="module")
def checks() -> dict[str, doctor.Check]:
    """Run every check."""
    return {check.name: check for run_check in doctor.CHECKS for check in run_check()}


def test_requirements_of_the_tests_are_ok(checks: dict[str, doctor.Check]) -> None:
    for name in (
        "Python",
        "torch",
        "disk",
        "gloo",
        "megatron-core",
        "transformers",
        "ops on torch",
    ):
        assert checks[name].status == "ok", checks[name]


def test_off_and_broken_have_a_reason(checks: dict[str, doctor.Check]) -> None:
    for check in checks.values():
        assert check.detail
        if check.status != "ok":
            assert check.cure or check.name.startswith(("ops on", "NCCL")), check


def test_json_and_table_have_the_same_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = [
        doctor.Check("a", "ok", "1.2"),
        doctor.Check("b", "off", "[brackets] are kept", "install it"),
    ]
    monkeypatch.setattr(doctor, "CHECKS", [lambda: some])
    assert doctor.report(as_json=True) is True
    result = json.loads(capsys.readouterr().out)
    assert result["healthy"] is True
    assert result["checks"][1] == {
        "name": "b",
        "status": "off",
        "detail": "[brackets] are kept",
        "cure": "install it",
    }
    assert doctor.report() is True
    table = capsys.readouterr().out
    for text in (
        "1.2",
        "[brackets] are kept",
        "install it",
        "Everything that fastrlhf needs works here.",
    ):
        assert text in table


def test_a_cure_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    cure = "pip install 'a-package-of-a-very-long-name[and-extras]'"
    monkeypatch.setattr(doctor, "CHECKS", [lambda: [doctor.Check("x", "off", "no", cure)]])
    doctor.report()
    assert cure in capsys.readouterr().out, "commands are copied from the table"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    doctor.report()
    folded = capsys.readouterr().out
    assert "…" not in folded and cure not in folded


def test_broken_is_unhealthy_and_off_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [lambda: [doctor.Check("x", "off", "d")]])
    assert doctor.report() is True
    monkeypatch.setattr(doctor, "CHECKS", [lambda: [doctor.Check("x", "broken", "d", "c")]])
    assert doctor.report() is False
    assert "Something that fastrlhf needs is broken." in capsys.readouterr().out


def test_without_torch_the_report_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.report(as_json=True) is False
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert (last["name"], last["status"]) == ("torch", "broken")


def test_gloo_that_cannot_connect_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    [check] = doctor._gloo()
    assert check.status == "broken"
    assert "GLOO_SOCKET_IFNAME" in check.cure


def test_a_timeout_is_not_called_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_GLOO_LIMIT_S", 0.01)
    monkeypatch.setattr(doctor, "CHECKS", [doctor._gloo])
    assert doctor.report(as_json=False) is False
    text = " ".join(capsys.readouterr().out.split())
    assert "timeout" in text and "too busy" in text and "a check did not end in time" in text
    assert "is broken" not in text


def test_full_disk_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", full)
    [check] = doctor._disk()
    assert check.status == "broken"
    assert check.detail.endswith("cannot be written: No space left on device")


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [
        ("0.16.0", "broken", "too old"),
        ("0.16.1", "ok", "a tested version"),
        ("0.19.2", "ok", "a tested version"),
        ("0.16.10", "ok", "tested versions are"),
        ("0.20.0", "ok", "tested versions are"),
    ],
)
def test_megatron_versions(
    monkeypatch: pytest.MonkeyPatch, version: str, status: str, words: str
) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda _: version)
    [check] = doctor._megatron()
    assert check.status == status
    assert words in check.detail


def test_three_kinds_of_apex(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert "not installed" in doctor._apex()[0].detail
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    try:
        assert "PyPI's apex is installed, which is not NVIDIA's" in doctor._apex()[0].detail
        (tmp_path / "apex" / "optimizers.py").touch()
        doctor.importlib.invalidate_caches()
        [check] = doctor._apex()
        assert check.status == "off"
        assert "without its CUDA extension amp_C" in check.detail
        monkeypatch.setitem(sys.modules, "amp_C", ModuleType("amp_C"))
        assert doctor._apex()[0].status == "ok"
    finally:
        sys.modules.pop("apex", None)


def test_installed_package_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    [check] = doctor._flash_attention()
    assert (check.status, check.detail) == ("off", "does not import: undefined symbol: _ZN3c10")
    (tmp_path / "flash_attn.py").write_text("import a_dependency_that_is_missing")
    doctor.importlib.invalidate_caches()
    [check] = doctor._flash_attention()
    assert check.detail == "does not import: No module named 'a_dependency_that_is_missing'"


def test_triton_can_be_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor._triton()[0].status == "ok"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert doctor._triton()[0].status == "off"


def test_gpu_line_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=139 * doctor.GIB, major=9, minor=0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: gpu)
    monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
    assert doctor._gpus() == [
        doctor.Check("GPU 0", "ok", "NVIDIA H200, 139 GiB, sm_90, driver 580.1")
    ]
