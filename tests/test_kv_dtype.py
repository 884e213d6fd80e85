"""The benchmark of quantised keys and values: its measure in closed form, and that it compares different videos."""

import json

import pytest
import torch

from benchmarks import kv_dtype
from benchmarks.kv_dtype import OTHER_KERNEL, main, psnr, table
from streamvid.kv_storage import KV_DTYPES


def test_psnr_of_a_constant_error():
    video = torch.full((2, 3, 4, 4, 3), 100, dtype=torch.uint8)
    other = video.clone()
    other[1] += 10
    assert psnr(video, other).tolist() == pytest.approx([99.0, 20 * torch.tensor(25.5).log10().item()])


def test_a_short_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kv_dtype, "WARM_UP", 0)
    monkeypatch.setattr(kv_dtype, "WINDOW", 1)
    monkeypatch.setattr(kv_dtype, "WINDOW_FRAMES", 1)
    monkeypatch.setattr(kv_dtype, "load_probe", lambda model: None)
    main(["--prompts", "1", "--blocks", "4", "--output", str(tmp_path / "found.json")])
    result = json.loads((tmp_path / "found.json").read_text())
    rows = {row["kv_dtype"]: row for row in result["rows"]}
    assert list(rows) == [*KV_DTYPES, OTHER_KERNEL] and result["seconds"] == 3.0
    assert rows["native"]["psnr_end"] == {"mean": 99.0, "worst": 99.0}
    assert 99 > rows["int8"]["psnr_end"]["mean"] > rows["kivi2"]["psnr_end"]["mean"]
    sizes = [rows[name]["bytes_wan_1.3B"]["self_forcing"] for name in ("native", "int8", "kivi2")]
    assert sizes == sorted(sizes, reverse=True)
    assert table(result) in capsys.readouterr().out
