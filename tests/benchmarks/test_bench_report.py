"""Tables and plots say what the rows say."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from benchmarks import plot, table
from benchmarks.rows import write_rows

RUNNER = CliRunner()
BEGIN, END = "<!-- rows: rows.json -->", "<!-- rows end -->"


@pytest.fixture
def rows(make_row):
    """Two implementations and the roofline at three sizes and in two phases; a peer that ran out of memory at the last."""
    rows = []
    for phase, factor in (("forward", 1.0), ("forward_backward", 3.0)):
        for tokens in (1, 512, 16384):
            common = {"phase": phase, "tokens": tokens}
            rows += [
                make_row(**common, ms=0.25 * factor * tokens),
                make_row(**common, implementation="grouped_mm", ms=0.5 * factor * tokens, peak_mib=40.0),
                make_row(**common, implementation="eager", ms=None if tokens > 512 else 4.0 * tokens, peak_mib=None),
                make_row(**common, implementation="roofline", ms=0.1 * factor * tokens, peak_mib=None),
            ]
    return rows


def cells(markdown: str, start: str) -> list[str]:
    """The cells of the first table line that begins with ``start``."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


class TestTable:
    def test_cells(self, rows):
        markdown = table.render(rows)
        assert cells(markdown, "forward, ms") == ["T=1", "T=512", "T=16384"]
        assert cells(markdown, "moe_fused") == ["**0.250 (2.00×)**", "**128 (2.00×)**", "**4096 (2.00×)**"]
        assert cells(markdown, "grouped_mm") == ["0.500", "256", "8192"]
        assert cells(markdown, "eager") == ["4.00 (0.12×)", "2048 (0.12×)", "–"]
        assert cells(markdown, "moe_fused, share of the roofline reached") == ["40%"] * 3
        assert cells(markdown, "moe_fused, peak MiB") == ["12 (31%)"] * 3
        assert cells(markdown, "grouped_mm, peak MiB") == ["40"] * 3

    def test_where_the_numbers_come_from(self, rows):
        heading = table.render(rows).splitlines()[0]
        for part in (
            "qwen3-30b-a3b",
            "bf16",
            "NVIDIA H100 80GB HBM3",
            "torch 2.11.0+cu130",
            "Triton 3.6.0",
            "2026-11-23",
        ):
            assert part in heading

    def test_details_of_ours_and_of_the_baseline(self, make_row):
        details = {"tokens_per_second": 10422.7, "gpu_busy": 0.968, "mfu": 0.2496}
        rows = [
            make_row(tokens=4096, ms=393.0, details=details),
            make_row(tokens=1, ms=1.0),
            make_row(tokens=4096, implementation="grouped_mm", ms=1178.0, details=details),
        ]
        markdown = table.render(rows)
        assert cells(markdown, "moe_fused, tokens/s") == ["", "10,423"]
        assert cells(markdown, "moe_fused, GPU busy") == ["", "97%"]
        assert cells(markdown, "moe_fused, model FLOP utilization") == ["", "25%"]
        assert cells(markdown, "grouped_mm, tokens/s") == ["", "10,423"]
        assert "grouped_mm, model FLOP utilization" not in markdown
        assert "GPU time" not in markdown

    def test_gpu_time_stands_beside_wall_time(self, make_row):
        """With our rows without CUDA graphs right after ours, and ratios of each kind of time."""
        rows = [
            make_row(benchmark="finetune_30b", implementation=name, ms=ms, details={"gpu_busy_ms": gpu}, peak_mib=peak)
            for name, ms, gpu, peak in (
                ("composed", 1000.0, 200.0, 4096.0),
                ("peft", 2000.0, 400.0, None),
                ("moe_fused_eager", 500.0, 100.0, 2048.0),
                ("moe_fused", 125.0, 100.0, 2048.0),
            )
        ]
        markdown = table.render(rows)
        names = [line.split(" |")[0][2:] for line in markdown.splitlines() if line.startswith("| ")]
        assert names[2:6] == ["moe_fused", "moe_fused_eager", "composed", "peft"]
        assert cells(markdown, "moe_fused_eager") == ["500 (2.00×)"]
        assert cells(markdown, "moe_fused, GPU time, ms") == ["100 (2.00×)"]
        assert cells(markdown, "composed, GPU time, ms") == ["200"]
        assert cells(markdown, "peft, GPU time, ms") == ["400 (0.50×)"]
        assert cells(markdown, "moe_fused_eager, peak MiB") == ["2048 (50%)"]
        small = table.summary(rows)
        assert "moe_fused" not in small
        assert cells(small, "moe-fused, ms of a step (of GPU time)") == ["125 (100)"]
        assert cells(small, "moe-fused without CUDA graphs, ms of a step (of GPU time)") == ["500 (100)"]
        assert cells(small, "moe-fused, speed over “bitsandbytes + torch._grouped_mm” (by GPU time)") == [
            "**8.00×** (2.00×)"
        ]
        assert cells(small, "bitsandbytes + torch._grouped_mm, peak GiB") == ["4.0"]

    def test_a_summary_names_implementations_in_words(self, make_row):
        with pytest.raises(ValueError, match=r"a summary must be of moe_fused, .* got grouped_mm"):
            table.summary([make_row(implementation="grouped_mm")])
        with pytest.raises(ValueError, match="one GPU, layer, rank and phase"):
            table.summary([make_row(), make_row(gpu="NVIDIA L4")])

    def test_every_table_is_well_formed(self, rows):
        for block in table.render(rows).split("\n\n"):
            if block.startswith("|"):
                assert len({line.count("|") for line in block.splitlines()}) == 1

    def test_a_layer_each(self, rows, make_row):
        markdown = table.render([*rows, make_row(layer="deepseek-v2-lite"), make_row(weights="nf4", lora_rank=16)])
        assert "**deepseek-v2-lite**, bf16 on" in markdown
        assert "**qwen3-30b-a3b**, nf4, LoRA rank 16 on" in markdown

    def test_no_baseline_no_ratio(self, make_row):
        assert cells(table.render([make_row(ms=12.345)]), "moe_fused") == ["12.3"]

    def test_several_baselines(self, make_row):
        """The 4-bit benchmark has several baselines.

        Brackets compare with the first, and each of the others has a line of its own.
        """

        def at(tokens, **times):
            return [
                make_row(
                    benchmark="experts_4bit",
                    tokens=tokens,
                    implementation=name,
                    weights="bf16" if name == "moe_fused_bf16" else "nf4",
                    ms=ms,
                )
                for name, ms in times.items()
            ]

        rows = [
            *at(1, moe_fused=0.1, composed=0.5, dequantize_first=0.25, moe_fused_bf16=0.05, roofline=0.02),
            *at(512, moe_fused=1.0, composed=1.9, dequantize_first=None, moe_fused_bf16=2.0, roofline=0.5),
        ]
        markdown = table.render(rows)
        assert markdown.startswith("**qwen3-30b-a3b**, nf4 on NVIDIA H100 80GB HBM3")
        assert "relative to composed." in markdown.splitlines()[0]
        assert cells(markdown, "moe_fused") == ["**0.100 (5.00×)**", "**1.00 (1.90×)**"]
        assert cells(markdown, "composed") == ["0.500", "1.90"]
        assert cells(markdown, "dequantize_first") == ["0.250 (2.00×)", "–"]
        assert cells(markdown, "moe_fused_bf16") == ["0.050 (10.00×)", "2.00 (0.95×)"]
        assert cells(markdown, "moe_fused, speed over dequantize_first's") == ["2.50×", ""]
        assert cells(markdown, "moe_fused, speed over moe_fused_bf16's") == ["0.50×", "2.00×"]
        assert cells(markdown, "moe_fused, share of the roofline reached") == ["20%", "50%"]
        assert cells(markdown, "dequantize_first, peak MiB") == ["12 (100%)", "12 (100%)"]

    def test_memory_without_a_share(self, make_row):
        """There is no share of memory if the baseline ran out of it, was not measured, or needed almost none."""
        baselines = [make_row(tokens=t, implementation="grouped_mm", peak_mib=p) for t, p in ((1, None), (2, 0.2))]
        markdown = table.render([*(make_row(tokens=t) for t in (1, 2, 3)), *baselines])
        assert cells(markdown, "moe_fused, peak MiB") == ["12", "12", "12"]
        assert cells(markdown, "grouped_mm, peak MiB") == ["", "0", ""]

    def test_ranks_of_lora(self, make_row):
        """A table each: the ratios of one rank are not those of another."""
        rows = [
            make_row(
                benchmark="experts_lora",
                phase=phase,
                lora_rank=rank,
                implementation=name,
                weights="bf16" if name == "peft" else "nf4",
                ms=ms * rank,
                peak_mib=peak,
            )
            for rank in (16, 64)
            for phase in ("forward_backward", "recompute")
            for name, ms, peak in (("moe_fused", 1.0, 300.0), ("composed", rank / 8, 600.0), ("peft", 8.0, 2400.0))
        ]
        low, high = table.render(rows).split("LoRA rank 64")
        assert "**qwen3-30b-a3b**, nf4, LoRA rank 16 on NVIDIA H100" in low
        for markdown, ours, ratio in ((low, "16.0", "2.00"), (high, "64.0", "8.00")):
            assert cells(markdown, "forward + backward, ms") == ["T=512"]
            assert cells(markdown, "forward + backward with recomputation, ms") == ["T=512"]
            assert cells(markdown, "moe_fused") == [f"**{ours} ({ratio}×)**"]
            assert cells(markdown, "moe_fused, speed over peft's") == ["8.00×"]
            assert cells(markdown, "moe_fused, peak MiB") == ["300 (50%)"]
            assert cells(markdown, "composed, peak MiB") == ["600"]
            assert cells(markdown, "peft, peak MiB") == ["2400 (400%)"]

    def test_no_rows(self):
        with pytest.raises(ValueError, match="at least one row"):
            table.render([])


class TestDocument:
    @pytest.fixture
    def document(self, tmp_path, rows):
        write_rows(tmp_path / "rows.json", rows)
        path = tmp_path / "README.md"
        path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe rest.\n", encoding="utf-8")
        return path

    def run(self, document, *options):
        app = table.typer.Typer()
        app.command()(table.main)
        return RUNNER.invoke(app, [str(document), *options])

    def test_renew_then_check(self, document, rows):
        assert self.run(document, "--check").exit_code == 1
        assert "\nold\n" in document.read_text(encoding="utf-8"), "--check must not write"
        assert self.run(document).exit_code == 0
        text = document.read_text(encoding="utf-8")
        assert text == f"# Title\n\n{BEGIN}\n\n{table.render(rows)}\n\n{END}\n\nThe rest.\n"
        assert self.run(document, "--check").exit_code == 0

    def test_a_number_typed_by_hand_fails_the_check(self, document):
        self.run(document)
        text = document.read_text(encoding="utf-8")
        document.write_text(text.replace("(2.00×)", "(9.00×)", 1), encoding="utf-8")
        assert self.run(document, "--check").exit_code == 1

    def test_several_tables_and_filters(self, document, make_row, tmp_path):
        write_rows(
            tmp_path / "more.json", [make_row(ms=7.0), make_row(ms=8.0, layer="tiny"), make_row(ms=9.0, tokens=1)]
        )
        begin = "<!-- rows: more.json layer=qwen3-30b-a3b tokens=512 -->"
        document.write_text(f"{begin}\n{END}\nbetween\n{BEGIN}\n{END}\n", encoding="utf-8")
        assert self.run(document).exit_code == 0
        first, second = document.read_text(encoding="utf-8").split("between")
        assert cells(first, "moe_fused") == ["7.00"]
        assert cells(second, "moe_fused")[0] == "**0.250 (2.00×)**"

    def test_summary(self, document, make_row, tmp_path):
        write_rows(tmp_path / "steps.json", [make_row(benchmark="finetune_30b", ms=7.0, peak_mib=1024.0)])
        document.write_text(f"<!-- rows: steps.json tokens=512 view=summary -->\n{END}\n", encoding="utf-8")
        assert self.run(document).exit_code == 0
        text = document.read_text(encoding="utf-8")
        assert cells(text, "moe-fused, ms of a step (of GPU time)") == ["7.00"]
        assert cells(text, "moe-fused, peak GiB") == ["1.0"]

    def test_rows_that_do_not_exist_yet(self, document, rows, tmp_path):
        document.write_text(f"{BEGIN.replace('rows.json', 'later.json')}\n{END}\n{BEGIN}\n{END}\n", encoding="utf-8")
        assert self.run(document).exit_code == 0
        first, second = document.read_text(encoding="utf-8").split(END)[:2]
        assert first.endswith("-->\n\nNot measured yet.\n\n")
        assert cells(second, "moe_fused")[0] == "**0.250 (2.00×)**"
        write_rows(tmp_path / "later.json", rows)
        assert self.run(document, "--check").exit_code == 1
        assert self.run(document).exit_code == 0
        assert "Not measured" not in document.read_text(encoding="utf-8")

    def test_plot_follows_its_table(self, document, rows, tmp_path):
        plot.save(rows, tmp_path / "rows.png")
        assert self.run(document).exit_code == 0
        text = document.read_text(encoding="utf-8")
        assert text.count("](rows.png)") == 1
        assert text.index("| roofline |") < text.index("](rows.png)") < text.index(END)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            pytest.param("no markers", "no '<!-- rows: FILE -->'", id="no markers"),
            pytest.param(BEGIN, "has no '<!-- rows end -->' after it", id="no end"),
            pytest.param(f"{BEGIN}\n{BEGIN}\n{END}", "has no '<!-- rows end -->' after it", id="begin twice"),
            pytest.param(f"<!-- rows: rows.json speed=1 -->\n{END}", "filter must be one of", id="unknown key"),
            pytest.param(f"<!-- rows: rows.json tokens=3 -->\n{END}", "no row fits", id="nothing left"),
        ],
    )
    def test_bad_document(self, document, text, message):
        document.write_text(text, encoding="utf-8")
        result = self.run(document)
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert document.read_text(encoding="utf-8") == text


class TestPlot:
    @pytest.mark.parametrize("metric", plot.METRICS)
    def test_png(self, tmp_path, rows, metric):
        path = tmp_path / "deep" / "plot.png"
        assert plot.save(rows, path, metric)
        assert path.read_bytes().startswith(b"\x89PNG\r\n")

    def test_panels_and_lines(self, rows, make_row):
        more = [make_row(layer="deepseek-v2-lite", tokens=t) for t in (1, 8, 32)]
        drawn = plot.figure([*rows, *more], "ms")
        titles = [axes.get_title() for axes in drawn.axes]
        assert titles == [
            "qwen3-30b-a3b, forward",
            "deepseek-v2-lite, forward",
            "qwen3-30b-a3b, forward + backward",
            "deepseek-v2-lite, forward + backward",
        ]
        ours = drawn.axes[0].lines[0].get_xydata()
        assert ours.tolist() == [[1, 0.25], [512, 128.0], [16384, 4096.0]]
        eager = next(line for line in drawn.axes[0].lines if len(line.get_xydata()) == 2)
        assert eager.get_xydata().tolist() == [[1, 4.0], [512, 2048.0]], "a row without a time has no point"

    def test_speedup_and_legend(self, rows):
        drawn = plot.figure(rows)
        assert drawn.axes[0].lines[0].get_xydata().tolist() == [[1, 2.0], [512, 2.0], [16384, 2.0]]
        labels = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert labels[:2] == ["moe_fused", "grouped_mm"]
        # In forward + backward it reaches 0.375 at one token, so it has a place in the picture.
        assert labels[2] == "eager"

    def test_below_the_axis_is_said_in_the_legend(self, rows):
        drawn = plot.figure([row for row in rows if row.phase == "forward"])
        labels = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert labels[2] == "eager (below 0.25×)"

    def test_phase_of_few_sizes_is_left_out(self, rows, make_row):
        graph = [make_row(phase="forward_cuda_graph", tokens=t) for t in (1, 8)]
        assert len(plot.figure([*rows, *graph]).axes) == 2

    def test_a_phase_of_one_layer_only(self, rows, make_row):
        """A run that was cut short leaves a gap in the grid."""
        other = [make_row(layer="deepseek-v2-lite", tokens=tokens) for tokens in (1, 512)]
        lines = [len(axes.lines) for axes in plot.figure([*rows, *other]).axes]
        assert lines[3] == 0 < min(lines[0], lines[2])

    def test_nothing_to_draw(self, tmp_path, make_row):
        assert not plot.save([make_row()], tmp_path / "plot.png")
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="at least 3 token counts"):
            plot.figure([make_row()])

    def test_baseline_is_that_of_the_benchmark(self, make_row):
        rows = [
            make_row(benchmark="experts_4bit", implementation=name, tokens=t, weights=weights, ms=ms * t)
            for t in (1, 8, 32)
            for name, weights, ms in (
                ("moe_fused", "nf4", 1.0),
                ("composed", "nf4", 4.0),
                ("moe_fused_bf16", "bf16", 2.0),
            )
        ]
        drawn = plot.figure(rows)
        assert drawn.axes[0].get_ylabel() == "times composed's speed"
        assert [line.get_xydata()[:, 1].tolist() for line in drawn.axes[0].lines] == [[4.0] * 3, [1.0] * 3, [2.0] * 3]
        assert ", nf4, torch" in drawn.get_suptitle()
        with pytest.raises(ValueError, match="one benchmark of"):
            plot.figure([*rows, make_row()])

    def test_ranks_of_lora_are_panels_of_their_own(self, make_row):
        rows = [
            make_row(
                benchmark="experts_lora",
                phase=phase,
                lora_rank=rank,
                implementation=name,
                tokens=tokens,
                ms=ms * tokens,
            )
            for rank in (16, 64)
            for phase in ("forward_backward", "recompute")
            for tokens in (512, 4096, 16384)
            for name, ms in (("moe_fused", 1.0), ("composed", rank / 8))
        ]
        drawn = plot.figure(rows)
        assert [axes.get_title() for axes in drawn.axes] == [
            "qwen3-30b-a3b, LoRA rank 16, forward + backward",
            "qwen3-30b-a3b, LoRA rank 64, forward + backward",
            "qwen3-30b-a3b, LoRA rank 16, recompute",
            "qwen3-30b-a3b, LoRA rank 64, recompute",
        ]
        ours = [axes.lines[0].get_xydata()[:, 1].tolist() for axes in drawn.axes]
        assert ours == [[2.0] * 3, [8.0] * 3] * 2

    def test_several_gpus(self, rows, make_row):
        with pytest.raises(ValueError, match="one GPU, got NVIDIA H100 80GB HBM3, NVIDIA L4"):
            plot.figure([*rows, make_row(gpu="NVIDIA L4")])

    def test_unknown_metric(self, rows):
        with pytest.raises(ValueError, match="metric must be one of speedup, ms, got 'tflops'"):
            plot.figure(rows, "tflops")

    def test_command(self, tmp_path, rows):
        write_rows(tmp_path / "rows.json", rows)
        app = plot.typer.Typer()
        app.command()(plot.main)
        assert RUNNER.invoke(app, [str(tmp_path / "rows.json")]).exit_code == 0
        assert (tmp_path / "rows.png").exists()
        missing = RUNNER.invoke(app, [str(tmp_path / "gone.json")])
        assert missing.exit_code == 1
        assert "gone.json" in missing.stderr
