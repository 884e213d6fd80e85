"""`streamvid kernels check`, comparison before a run, and goldens through every backend that is here."""

from pathlib import Path

import pytest
import torch
from streamvid.kernels import attention, check, companions
from streamvid.kernels.attention import BACKENDS, Backend, chosen, reference, unavailable
from streamvid.kernels.companions import PLAIN, Companions

from streamvid.cli import main
from streamvid.errors import UserError
from streamvid.parity import run_case

GOLDEN = Path(__file__).parent.parent / "golden"
HERE = [name for name in BACKENDS if not unavailable(name)]


@pytest.fixture(autouse=True)
def small_and_forgotten(monkeypatch):
    """Little to time, and nothing stays disabled after a test."""
    monkeypatch.setattr(check, "TIMED", {"cpu": (1, 8, 8, 1, 16), "cuda": (1, 64, 64, 1, 64)})
    monkeypatch.setattr(attention, "_disabled", {})
    monkeypatch.setattr(companions, "_disabled", {})


ONE = {"window": (1, 5, 9, 1, 16, "")}


def wrong(q, k, v, mask=None):
    return 1.001 * reference(q, k, v, mask)


# one dtype: without a GPU PyTorch traces flex anew for every shape; tiled has no other
ONCE = {"flex": torch.float32, "tiled": torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in HERE for d in check.ROUNDING if ONCE.get(n, d) == d]
)
def test_every_backend_that_is_here_is_right(name, dtype):
    result = check.check_backend(name, "cpu", dtype, timed=False)
    assert result.verdict == "right" and 0 <= result.error <= result.allowed, result


@pytest.mark.parametrize("problem", list(check.PROBLEMS))
def test_a_backend_that_drops_the_mask_is_found(monkeypatch, problem):
    """The problems that have a mask tell it."""
    *shape, mask = check.PROBLEMS[problem]
    monkeypatch.setitem(BACKENDS, "deaf", Backend(lambda q, k, v, mask=None: reference(q, k, v)))
    off = check.relative_error("deaf", check.tensors(shape, mask, "cpu", torch.float32))
    assert (off > 0.1) == bool(mask)


def test_a_wrong_backend_is_told_and_disabled(monkeypatch, capsys):
    monkeypatch.setattr(check, "BACKENDS", {"sdpa": BACKENDS["sdpa"], "bad": Backend(wrong)})
    monkeypatch.setitem(BACKENDS, "bad", Backend(wrong))
    assert main(["kernels", "check", "--device", "cpu", "--dtype", "float32"]) == 1
    sdpa_line, bad_line = capsys.readouterr().out.splitlines()[2:4]
    assert sdpa_line.split()[:2] == ["sdpa", "right"] and float(sdpa_line.split()[-1]) > 0
    assert bad_line.split()[:2] == ["bad", "wrong"] and "of the largest output, allowed" in bad_line
    with pytest.raises(
        UserError, match="attention backend = bad is disabled, it computes something wrong here"
    ):
        attention.attention_backend("bad")


def test_a_backend_that_breaks_or_returns_no_number_is_wrong(monkeypatch):
    def broken(q, k, v, mask=None):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(BACKENDS, "broken", Backend(broken))
    monkeypatch.setitem(BACKENDS, "nan", Backend(lambda q, k, v, mask=None: q * float("nan")))
    with pytest.warns(UserWarning, match="broken: RuntimeError: no kernel image"):
        assert check.check_backend("broken", "cpu", torch.float32).verdict == "wrong"
    assert check.check_backend("nan", "cpu", torch.float32).verdict == "wrong"


def test_all_are_checked(monkeypatch, capsys):
    monkeypatch.setattr(check, "PROBLEMS", ONE)
    monkeypatch.setattr(check, "OPTIONS", ("plain",))
    assert main(["kernels", "check", "--device", "cpu", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "attention and fused kernels on cpu in float32, against float64"
    assert [line.split()[0] for line in lines[2:]] == [*BACKENDS, *Companions._fields]


DROPPED = {"bias": {"bias": None}, "gain": {"gain": None}, "phase": {"phase": None}, "parts": {}}


@pytest.mark.parametrize("option", DROPPED)
def test_a_windowed_attention_that_drops_an_option_is_found(monkeypatch, option):
    windowed_triton = pytest.importorskip("streamvid.kernels.windowed_triton")
    monkeypatch.setattr(check, "PROBLEMS", ONE)
    monkeypatch.setattr(check, "OPTIONS", ("plain", option))
    assert check.check_backend("triton", "cpu", torch.float32).verdict == "right"
    right = windowed_triton.attend

    def deaf(q, parts):
        return right(q, [part._replace(**DROPPED[option]) for part in parts[:1]])

    monkeypatch.setattr(windowed_triton, "attend", deaf)
    found = check.check_backend("triton", "cpu", torch.float32)
    assert found.verdict == "wrong" and found.note.startswith(f"windowed, {option}: off by")
    assert "is disabled" in unavailable("triton")


def test_a_wrong_kernel_is_told_and_its_twin_serves(monkeypatch, capsys):
    companions_triton = pytest.importorskip("streamvid.kernels.companions_triton")
    monkeypatch.setattr(check, "BACKENDS", {name: BACKENDS[name] for name in ("sdpa", "triton")})
    monkeypatch.setattr(check, "PROBLEMS", ONE)
    monkeypatch.setattr(check, "OPTIONS", ("plain",))
    monkeypatch.setattr(
        companions_triton, "gated_sum", lambda x, y, gate: 1.001 * PLAIN.gated_sum(x, y, gate)
    )
    monkeypatch.setattr(companions_triton, "fuse_sink", lambda *given: None)  # writes nothing
    assert main(["kernels", "check", "--device", "cpu", "--dtype", "float32"]) == 1
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:]}
    verdicts = {name: rows[name].split()[1] for name in Companions._fields}
    assert [name for name, verdict in verdicts.items() if verdict == "wrong"] == ["gated_sum", "fuse_sink"]
    assert "of the largest output, allowed 1.0e-05" in rows["gated_sum"]
    serving = companions.companions("triton", "cpu")
    assert serving.gated_sum is PLAIN.gated_sum and serving.modulated_norm is not PLAIN.modulated_norm
    companions._disabled.clear()
    with pytest.warns(
        UserWarning, match="fused kernel gated_sum is disabled, it computes something wrong here"
    ):
        check.verify("triton", "cpu", torch.float32)


def test_on_a_gpu_kernels_are_compared_before_they_serve(monkeypatch):
    asked = []
    monkeypatch.setattr(check, "verify_companions", lambda *given: asked.append(given))
    companions._verify.cache_clear()
    for _ in range(2):
        companions.companions("auto", "cuda:7")
    assert asked == [(torch.device("cuda:7"), torch.bfloat16)]


def test_verifying_before_a_run(monkeypatch):
    check.verify("auto", "cpu", torch.float32)
    assert not attention._disabled
    monkeypatch.setitem(BACKENDS, "sdpa", BACKENDS["sdpa"]._replace(attend=wrong))
    with pytest.warns(UserWarning, match="sdpa is disabled"):
        check.verify("auto", "cpu", torch.float32)
    x = torch.zeros(1, 2, 1, 8)
    assert chosen(x, x, x) == "reference"
    attention._disabled.clear()
    with pytest.raises(UserError, match="sdpa is disabled, it computes something wrong here"):
        check.verify("sdpa", "cpu", torch.float32)


# all cases take half a minute with each backend: `streamvid parity --attention NAME tests/golden/*`
@pytest.mark.parametrize("name", [name for name in HERE if name != "tiled"])  # they are in float32
@pytest.mark.parametrize("case", ["wan_bidirectional"])
def test_goldens_pass_through_every_backend(name, case, monkeypatch):
    rows = run_case(GOLDEN / case, attention=name)
    assert rows and all(row.ok for row in rows), [row for row in rows if not row.ok]
    monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(attend=wrong))
    assert not all(row.ok for row in run_case(GOLDEN / case, attention=name))  # it is that backend that ran


def test_parity_refuses_an_unknown_backend(capsys):
    assert main(["parity", "--attention", "flash9", str(GOLDEN / "wan_bidirectional")]) == 2
    assert "attention backend = 'flash9' is not known" in capsys.readouterr().err
