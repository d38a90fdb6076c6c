"""Results as text: benchmarks.table, benchmarks.report, benchmarks.page and benchmarks.plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import plots, report, results, table
from repository import REPOSITORY
from support.benchmark_fakes import LIMITS, LOST, WON, FakeGpu, make_document, make_result

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_document_table_plots_and_report_name_the_gpu(tmp_path: Path, monkeypatch):
    facts = FakeGpu().device().facts()
    assert facts["gpu"] == "A GPU" and facts["capability"] == "CUDA sm_90"
    assert facts["capability of torch"] == f"CUDA {torch.version.cuda}"
    document = make_document(WON, LOST)
    titles: list[str] = []
    monkeypatch.setattr(plots, "_draw", lambda results, value, title, *rest: titles.append(title))

    def texts() -> tuple[str, str, list[str]]:
        titles.clear()
        plots.draw(document, tmp_path)
        return table.format_document(document), report.markdown(document, []), list(titles)

    shown, written, titled = texts()
    assert "won, 1 thread\n" in shown and ": A Processor (2 processors" in written
    assert all(title.endswith("(A Processor)") for title in titled)
    document["machine"] |= facts
    shown, written, titled = texts()
    assert "won, A GPU, 1 thread\n" in shown
    assert ": A GPU, A Processor (2 processors" in written and "(CUDA sm_90 kernels)" in written
    assert len(titled) == 2 and all(title.endswith("(A GPU)") for title in titled)


def test_table_marks_losses():
    lines = table.format_document(make_document(WON, LOST)).splitlines()
    rows = [line for line in lines if "4 x 4" in line and "fwd" in line]
    assert [row.rstrip().endswith("!") for row in rows] == [False, True]
    assert "2.00" in rows[0] and "4.00" in rows[0]
    assert "in 1 of 2 cases" in lines[-1] and "worst 0.50x (lost" in lines[-1]


def test_table_and_report_say_when_the_machine_was_busy():
    busy = make_result({"fastnn": 1.0, "peer": 2.0})
    busy["contenders"]["fastnn"]["interruptions"] = 100.0
    document = make_document(WON, busy)
    assert "in 1 of 2 cases: with" in table.format_document(document)
    assert "processor time in 1 of 2 cases" in report.markdown(document, [])
    assert "Other programs" not in table.format_document(make_document(WON))
    assert "Other programs" not in report.markdown(make_document(WON), [])


def gpu_document(*documents_results: dict) -> dict:
    document = make_document(*documents_results)
    document["machine"] |= FakeGpu().device().facts() | {"gpu driver": "580.1"}
    document["complaints"] = ["skipped: op b: no time left"]
    limits = {"gemm": LIMITS["gemm"] | {"tf32": 5e14}, "launch": {"kernels": 4e5}}
    document["limits"] = {"1": LIMITS | limits}
    return document


def gpu_result(ours: dict, peer: dict) -> dict:
    """A case of 1 and 4 seconds, whose contenders have more times."""
    result = make_result({"fastnn": 1.0, "peer": 4.0}, op="both")
    result["contenders"]["fastnn"] |= ours
    result["contenders"]["peer"] |= peer
    return result


TIMED = gpu_result({"loop": 2.0, "replay": 1.5, "waits": False}, {"loop": 1.0, "replay": 3.0})
WAITING = gpu_result({"loop": 2.0, "replay": 1.5}, {"loop": 8.0, "waits": True, "no_replay": "it"})
REFUSED = gpu_result({"loop": 2.0, "no_replay": "it"}, {"loop": 8.0, "replay": 3.0})


def test_best_rival_by_another_time():
    assert results.best_rival(TIMED, "loop") == ("peer", 0.5)
    assert results.best_rival(TIMED, "replay") == ("peer", 2.0)
    assert results.best_rival(WAITING, "replay") is None
    assert results.best_rival(REFUSED, "replay") is None
    assert results.best_rival(WON, "loop") is None


def test_table_shows_loops_and_graphs_where_there_are_some():
    shown = table.format_document(make_document(WON))
    assert "loop" not in shown and "graph" not in shown
    shown = table.format_document(gpu_document(TIMED, WAITING, REFUSED))
    rows = [line.split()[-7:] for line in shown.splitlines() if "4 x 4" in line]
    assert rows[0] == ["4.00", "2000.00", "ms", "0.50", "1500.00", "ms", "2.00"]
    assert rows[1][-5:] == ["2000.00", "ms", "4.00", "1500.00", "ms"]
    assert rows[2][-3:] == ["2000.00", "ms", "4.00"]
    assert "Waits for the GPU within a call somewhere: peer." in shown


def test_page_names_card_driver_and_torch_and_shows_all_times(tmp_path: Path):
    saved, page = tmp_path / "bench.json", tmp_path / "page.md"
    saved.write_text(json.dumps(gpu_document(TIMED, WAITING, REFUSED, LOST)))
    assert report.main([str(saved), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# Results on a GPU: A GPU\n")
    for fact in ("| card | A GPU |", "| driver | 580.1 |", "| torch | 2.13.0 |"):
        assert fact in text
    assert "| TF32 matrix product | 500.0 TFLOP/s |" in text
    assert "| launch of an empty kernel | 2.5 us |" in text
    assert "| both 4 x 4 float32 forward | loop | peer | **0.50x** |" in text
    assert "| both 4 x 4 float32 forward | graph | peer |" not in text
    assert "| lost 4 x 4 float32 forward | GPU | ahead | **0.50x** |" in text
    assert "| 4 x 4 | float32 | fwd | fastnn | 1000.00 ms | 2000.00 ms | 1500.00 ms |" in text
    assert "|  |  |  | peer | 4000.00 ms° | 8000.00 ms |  | 4.00x |  |" in text
    assert "- skipped: op b: no time left\n" in text
    assert "- the graph of peer (it): both 4 x 4 float32 forward" in text


def test_page_is_a_gpus(tmp_path: Path, capsys):
    saved, page = tmp_path / "bench.json", tmp_path / "page.md"
    saved.write_text(json.dumps(make_document(WON)))
    assert report.main([str(saved), "--page", str(page)]) == 2
    saved.write_text(json.dumps(gpu_document(WON)))
    assert report.main([str(saved), "--page", str(tmp_path / "none" / "page.md")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "a page needs the results of a GPU" in errors[0] and "is not a folder" in errors[1]
    assert not page.exists()


def test_results_saved_before_can_be_shown():
    saved = report.read_document(REPOSITORY / "benchmarks" / "results" / "avx2.json")
    assert "fastnn is ahead of the best peer in" in table.format_document(saved)
    assert report.markdown(saved, []).startswith("Measured on ")


def test_a_ratio_just_below_one_does_not_read_as_one():
    assert table.ratio_text(0.9999) == "0.99"
    assert table.ratio_text(1.0) == "1.00"


def write_readme(folder: Path, text: str) -> tuple[Path, Path]:
    readme, saved = folder / "README.md", folder / "results.json"
    readme.write_text(text)
    saved.write_text(json.dumps(make_document(WON, LOST)))
    return readme, saved


def test_report_replaces_what_is_between_the_markers(tmp_path: Path):
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    readme, saved = write_readme(tmp_path, text)
    arguments = [str(saved), "--readme", str(readme), "--plots", str(tmp_path / "plots")]
    assert report.main(arguments) == 0
    once = readme.read_text()
    assert once.startswith(f"before\n{report.BEGIN}\n") and once.endswith(f"{report.END}\nafter\n")
    assert "old" not in once
    assert "A Processor" in once and "2026-01-02" in once and "1 thread" in once
    assert "**0.50x**" in once  # losses are shown
    assert "(plots/ratio.png)" in once
    assert (tmp_path / "plots" / "ratio.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(arguments) == 0
    assert readme.read_text() == once


@pytest.mark.parametrize("text", ["no markers", f"{report.END}\n{report.BEGIN}", report.BEGIN])
def test_report_refuses_a_readme_without_markers(tmp_path: Path, text: str, capsys):
    readme, saved = write_readme(tmp_path, text)
    assert report.main([str(saved), "--readme", str(readme)]) == 2
    assert "the readme needs one" in capsys.readouterr().err
    assert readme.read_text() == text


def test_report_refuses_other_files(tmp_path: Path, capsys):
    readme, saved = write_readme(tmp_path, f"{report.BEGIN}{report.END}")
    saved.write_text("[]")
    assert report.main([str(saved), "--readme", str(readme)]) == 2
    assert report.main([str(tmp_path / "none"), "--readme", str(readme)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "holds no results" in errors[0] and "can't be read" in errors[1]


@pytest.mark.parametrize(
    "parts", [{}, {"machine": {"gpu": "A GPU"}, "command": "", "limits": {}, "results": []}]
)
def test_report_refuses_half_a_document(tmp_path: Path, parts: dict, capsys):
    saved = tmp_path / "bench.json"
    saved.write_text(json.dumps({"schema": make_document(WON)["schema"], **parts}))
    assert report.main([str(saved), "--page", str(tmp_path / "page.md")]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_report_puts_no_gpu_into_the_readme_and_no_page_where_a_folder_is(tmp_path: Path, capsys):
    readme, saved = write_readme(tmp_path, f"{report.BEGIN}{report.END}")
    before = readme.read_text()
    saved.write_text(json.dumps(gpu_document(WON)))
    assert report.main([str(saved), "--readme", str(readme)]) == 2
    assert report.main([str(saved), "--page", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "--page writes those of a GPU" in errors[0] and "Is a directory" in errors[1]
    assert readme.read_text() == before


def test_the_page_of_the_documentation_shows_the_saved_results():
    saved = report.read_document(REPOSITORY / "benchmarks/results/h200.json")
    assert (REPOSITORY / "docs/performance_cuda.md").read_text() == report.page(saved, [])


def test_plots_show_what_there_is(tmp_path: Path):
    drawn = plots.draw(make_document(WON, LOST), tmp_path)
    assert [path.name for path in drawn] == ["ratio.png"]  # none of these has a limit
