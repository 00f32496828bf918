"""Rows survive their file, and a file never mixes runs at one point."""

from __future__ import annotations

import json

import pytest

from benchmarks.rows import BASELINES, baselines_of, merge, read_rows, slug, weights_of, write_rows


def test_round_trip(tmp_path, make_row):
    rows = [make_row(), make_row(implementation="eager", ms=None, tflops=None, peak_mib=None), make_row(gpu="Größe 9")]
    path = tmp_path / "new" / "rows.json"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert list(tmp_path.rglob("*.json")) == [path], "a temporary file was left behind"


def test_file_is_a_list_of_objects_with_the_agreed_keys(tmp_path, make_row):
    path = tmp_path / "rows.json"
    write_rows(path, [make_row()])
    (row,) = json.loads(path.read_text(encoding="utf-8"))
    agreed = "benchmark gpu date torch triton layer tokens implementation phase weights lora_rank ms tflops peak_mib"
    assert list(row) == agreed.split()


def test_no_rows(tmp_path):
    write_rows(tmp_path / "rows.json", [])
    assert read_rows(tmp_path / "rows.json") == []


def test_failed_write_leaves_the_old_file(tmp_path, make_row, monkeypatch):
    path = tmp_path / "rows.json"
    write_rows(path, [make_row()])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_rows(path, [make_row(ms=1.0)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"ms": "fast"}, "ms of a benchmark row must be a number or null, got 'fast'", id="text for ms"),
        pytest.param({"tokens": 1.5}, "tokens of a benchmark row must be an integer, got 1.5", id="half a token"),
        pytest.param({"tokens": True}, "tokens of a benchmark row must be an integer, got True", id="bool for tokens"),
        pytest.param({"gpu": None}, "gpu of a benchmark row must be a string, got None", id="no GPU"),
        pytest.param({"speed": 1}, "must be an object with the keys", id="unknown key"),
    ],
)
def test_bad_row_is_named_with_its_file(tmp_path, make_row, change, message):
    path = tmp_path / "rows.json"
    write_rows(path, [make_row()])
    (row,) = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([{**row, **change}]), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        read_rows(path)
    assert str(path) in str(raised.value)


def test_rows_of_the_roofline_are_read_by_their_former_name_too(make_row, tmp_path):
    path = tmp_path / "rows.json"
    write_rows(path, [make_row(implementation=name) for name in ("floor", "roofline", "moe_fused")])
    assert [row.implementation for row in read_rows(path)] == ["roofline", "roofline", "moe_fused"]


@pytest.mark.parametrize("text", ["{}", "[1]", "[", ""], ids=["object", "number", "cut off", "empty"])
def test_file_without_rows(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.json"):
        read_rows(path)


def test_merge_replaces_whole_points(make_row):
    old = [
        make_row(ms=9.0),
        make_row(implementation="grouped_mm", ms=9.0),  # goes: its rival was measured again, in another run
        make_row(tokens=1, ms=9.0),
        make_row(implementation="dense", weights="fp16", ms=9.0),  # goes too, however it stored its weights
        make_row(lora_rank=16, ms=9.0),
        make_row(gpu="NVIDIA L4", ms=9.0),
    ]
    new = [make_row(ms=1.0)]
    merged = merge(old, new)
    assert [row for row in merged if row.point == new[0].point] == new
    assert sorted(row.ms for row in merged) == [1.0, 9.0, 9.0, 9.0]


def test_merge_keeps_the_order_of_implementations_and_sorts_the_rest(make_row):
    names = ("moe_fused", "grouped_mm", "batched_mm")
    new = [make_row(tokens=t, implementation=name) for t in (512, 1) for name in names]
    assert [(row.tokens, row.implementation) for row in merge([], new)] == [
        (t, name) for t in (1, 512) for name in names
    ]


def test_order_of_implementations_is_not_that_of_their_weights(make_row):
    new = [make_row(implementation=name, weights=weights) for name, weights in (("packed", "nf4"), ("dense", "bf16"))]
    assert merge([], new) == new


def test_baselines_are_those_of_the_benchmark(make_row):
    assert baselines_of([make_row(), make_row(tokens=1)]) == ("grouped_mm",)
    assert baselines_of([make_row(benchmark="experts_4bit")]) == ("composed", "dequantize_first", "moe_fused_bf16")


@pytest.mark.parametrize(
    ("benchmarks", "got"), [(("experts", "experts_4bit"), "experts, experts_4bit"), (("gemm",), "gemm"), ((), "none")]
)
def test_no_common_baseline(make_row, benchmarks, got):
    with pytest.raises(ValueError, match=f"rows must be of one benchmark of {', '.join(BASELINES)}, got {got}$"):
        baselines_of([make_row(benchmark=name) for name in benchmarks])


def test_weights_are_ours(make_row):
    peer = make_row(implementation="peer", weights="bf16")
    assert weights_of([peer, make_row(weights="nf4")]) == "nf4"
    assert weights_of([peer]) == "bf16"


def test_slug():
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert slug("AMD Instinct MI300X/OAM") == "instinct-mi300x-oam"
    assert slug("NVIDIA") == "unknown"
