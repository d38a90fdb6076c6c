"""Results as text and pictures: the tables, the pages, the small table, the plots."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import overview, plots, report, results, table
from benchmarks.cases import all_cases
from repository import REPOSITORY
from support.benchmark_fakes import LIMITS, LOST, WON, FakeGpu, make_document, make_result

pytestmark = pytest.mark.cpu_only("the benchmarks")


def test_document_table_plots_and_report_name_the_gpu(tmp_path: Path, monkeypatch):
    facts = FakeGpu().device().facts()
    assert facts["gpu"] == "A GPU" and facts["capability"] == "CUDA sm_90"
    assert facts["capability of torch"] == f"CUDA {torch.version.cuda}"
    document = make_document(WON, LOST)
    titles: list[str] = []
    monkeypatch.setattr(plots, "draw_rows", lambda series, title, *rest: titles.append(title))

    def texts() -> tuple[str, str, list[str]]:
        titles.clear()
        for result in document["results"]:
            result["share"] = 0.5
        plots.draw(document, tmp_path, "run")
        return table.format_document(document), report.page(document, []), list(titles)

    shown, written, titled = texts()
    assert "won, 1 thread\n" in shown
    assert "| processor | A Processor |\n| processors | 2 |" in written
    assert len(titled) == 2 and all(title.endswith("(A Processor)") for title in titled)
    document["machine"] |= facts
    shown, written, titled = texts()
    assert "won, A GPU, 1 thread\n" in shown
    assert "| card | A GPU |" in written and "| fastnn's kernels | CUDA sm_90 |" in written
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
    assert "processor time in 1 of 2 cases" in report.page(document, [])
    assert "Other programs" not in table.format_document(make_document(WON))
    assert "Other programs" not in report.page(make_document(WON), [])


def gpu_document(*documents_results: dict) -> dict:
    document = make_document(*documents_results)
    document["machine"] |= FakeGpu().device().facts() | {"gpu driver": "580.1"}
    document["complaints"] = ["skipped: op b: no time left"]
    limits = {"gemm": LIMITS["gemm"] | {"tf32": 5e14}, "launch": {"kernels": 4e5}}
    document["limits"] = {"1": LIMITS | limits}
    return document


def gpu_result(ours: dict, peer: dict) -> dict:
    """A case of 1 and 4 seconds whose contenders have loop and replay times, too."""
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


def test_page_of_a_cpu_names_the_machine_and_shows_losses(tmp_path: Path):
    saved, page = tmp_path / "bench.json", tmp_path / "page.md"
    saved.write_text(json.dumps(make_document(WON, LOST)))
    arguments = [str(saved), "--page", str(page), "--plots", str(tmp_path / "plots")]
    assert report.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("# Results with AVX2\n")
    assert "| processor | A Processor |" in text and "| date | 2026-01-02 |" in text
    assert "In 1 of 2 cases:" in text and "| (ahead) | **0.50x** |" in text.replace("500.0 us ", "")
    assert "| won | fwd | 1 | 1 of 1 | 2.00x | 2.00x (4 x 4, float32) |" in text
    assert re.search(r"^!\[Dots: .+\]\(plots/bench_ratio\.png\)$", text, re.MULTILINE)
    assert (tmp_path / "plots" / "bench_ratio.png").read_bytes().startswith(b"\x89PNG")


def test_a_ratio_just_below_one_does_not_read_as_one():
    assert table.ratio_text(0.9999) == "0.99"
    assert table.ratio_text(1.0) == "1.00"


STEP = make_result({"fastnn": 1e-3, "torch": 3e-3, "jax.jit": 0.5e-3}, op="MLP step", mode="step")
RELU = make_result(
    {"fastnn": 1e-3, "F.relu(F.linear)": 2e-3, "torch.compile": 2e-3},
    op="linear_relu",
    mode="forward_backward",
)


STEPS = [
    make_result({"fastnn": 2e-4, "torch": 4e-4, "jax.jit": 1e-4}, op=op, label=label, mode="step")
    for op in ("MLP step", "train_step")
    for label in ("CrossEntropyLoss", "batch of 256", "784-512-256-10")
]
HEAD = make_result(
    {
        "fastnn": 0.125,
        "F.linear, F.cross_entropy": 0.5,
        "torch.compile": 0.375,
        "torch.compile, auto-chunker, 2 chunks": 0.5,
        "torch.compile, auto-chunker, 8 chunks": 0.25,
        "F.linear_cross_entropy, 64 rows": 0.1875,
    },
    op="linear + cross_entropy",
    label="8, 2->9",
    mode="forward_backward",
)


def repository_with(root: Path, text: str = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"):
    """A repository whose pages have this text, and whose runs are small."""
    for name in ("docs", *map(str, [report.RESULTS])):
        (root / name).mkdir(parents=True)
    for name in report.SECTIONS:
        (root / name).write_text(text)
    runs = {
        "avx2": make_document(RELU, STEP),
        "avx512": make_document(RELU, HEAD, *STEPS),
        "h200": gpu_document(WON),
    }
    runs["avx512"]["machine"] |= {"capability": "avx512", "date": "2026-01-03"}
    for name, document in runs.items():
        (root / report.RESULTS / f"{name}.json").write_text(json.dumps(document))


def test_report_writes_every_page_and_what_is_between_the_markers(tmp_path: Path, monkeypatch):
    repository_with(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 0
    files = [*report.SECTIONS, *report.PAGES.values()]
    once = [Path(name).read_text() for name in files]
    readme, docs, steps, heads = once[:4]
    for text in (readme, docs):
        assert text.startswith(f"before\n{report.BEGIN}\n![Dots: ")
        assert text.endswith(f"{report.END}\nafter\n") and "old" not in text
        assert "| linear_relu | 2.00x | 2.00x | 2.00x (2.00x) | 2.00x (2.00x) |" in text
        assert "| MLP step | 3.00x | 2.00x | 0.50x (0.50x) | 0.50x (0.50x) |" in text
        assert "most often `jax.jit` (7)." in text
        assert "A Processor, 1 thread, torch 2.13.0 (AVX2 on 2026-01-02, AVX-512" in text
    assert "[1 of 2 cases with AVX2](docs/performance_avx2.md#where" in readme
    assert "[1 of 2 cases with AVX2](performance_avx2.md#where" in docs
    assert "](benchmarks/results/overview.png)" in readme
    assert "](../benchmarks/results/overview.png)" in docs
    for model in ("CrossEntropyLoss, 64", "CrossEntropyLoss, 256"):
        assert (
            f"| 784-128-64-10, {model} | 1 | 200.0 us | 2.00x | 0.50x (jax.jit) | 200.0 us |"
            in steps
        )
    assert "| 784-512-256-10, CrossEntropyLoss, 64 | 1 | 200.0 us | 2.00x |" in steps
    assert "| 8, 2->9 | fwd+bwd | 1 | 125.00 ms | 4.00x | 3.00x | 2.00x | 1.50x |  |" in heads
    assert report.PICTURE.read_bytes().startswith(b"\x89PNG")
    assert report.main([]) == 0
    assert [Path(name).read_text() for name in files] == once


@pytest.mark.parametrize("text", ["no markers", f"{report.END}\n{report.BEGIN}", report.BEGIN])
def test_report_refuses_a_page_without_markers(tmp_path: Path, text: str, monkeypatch, capsys):
    repository_with(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 2
    assert "README.md needs one" in capsys.readouterr().err
    assert {(tmp_path / name).read_text() for name in report.SECTIONS} == {text}
    assert not report.PICTURE.exists()


def test_report_refuses_other_files(tmp_path: Path, capsys):
    saved, page = tmp_path / "results.json", str(tmp_path / "page.md")
    saved.write_text("[]")
    assert report.main([str(saved), "--page", page]) == 2
    assert report.main([str(tmp_path / "none"), "--page", page]) == 2
    saved.write_text(json.dumps(make_document(WON)))
    assert report.main([str(saved), "--page", str(tmp_path)]) == 2
    assert report.main([str(saved), "--page", str(tmp_path / "none" / "page.md")]) == 2
    errors = capsys.readouterr().err.splitlines()
    found = ("holds no results", "can't be read", "Is a directory", "is not a folder")
    assert [message in error for message, error in zip(found, errors, strict=True)] == [True] * 4


def test_report_takes_a_run_and_its_page_together(tmp_path: Path, capsys):
    for arguments in ([str(tmp_path / "results.json")], ["--page", str(tmp_path / "page.md")]):
        with pytest.raises(SystemExit) as stopped:
            report.main(arguments)
        assert stopped.value.code == 2
        assert "FILE.json and --page go together" in capsys.readouterr().err


@pytest.mark.parametrize(
    "parts", [{}, {"machine": {"gpu": "A GPU"}, "command": "", "limits": {}, "results": []}]
)
def test_report_refuses_half_a_document(tmp_path: Path, parts: dict, capsys):
    saved = tmp_path / "bench.json"
    saved.write_text(json.dumps({"schema": make_document(WON)["schema"], **parts}))
    assert report.main([str(saved), "--page", str(tmp_path / "page.md")]) == 2
    assert "holds no results" in capsys.readouterr().err


@pytest.mark.parametrize("name", report.PAGES)
def test_the_pages_show_the_saved_results(name):
    document = report.read_document(REPOSITORY / report.RESULTS / f"{name}.json")
    assert "fastnn is ahead of the best peer in" in table.format_document(document)
    figures = [f"../benchmarks/results/{name}_{figure}.png" for figure in ("ratio", "share")]
    assert (REPOSITORY / report.PAGES[name]).read_text() == report.page(document, figures)


@pytest.mark.parametrize("name", report.SECTIONS)
def test_the_tables_of_the_pages_show_the_saved_results(name):
    runs = {
        run: report.read_document(REPOSITORY / report.RESULTS / f"{run}.json")
        for run in report.OVERVIEW
    }
    text = report.with_section(REPOSITORY, name, runs)
    assert (REPOSITORY / name).read_text() == text, "python -m benchmarks.report"


def test_every_contender_of_the_small_table_is_in_a_saved_run():
    """A renamed operator or contender would empty its cells."""
    named = {
        (result["op"], result["mode"], contender)
        for run in report.OVERVIEW
        for result in report.read_document(REPOSITORY / report.RESULTS / f"{run}.json")["results"]
        for contender in result["contenders"]
    }
    cases = {(case.op, case.mode) for case in all_cases()}
    for row in overview.ROWS:
        assert (row.op, row.mode) in cases
        if any(result[:2] == row[:2] for result in named):
            assert any((row.op, row.mode, name) in named for name in row.stock)


def test_plots_show_what_there_is(tmp_path: Path):
    drawn = plots.draw(make_document(WON, LOST), tmp_path, "run")
    assert [path.name for path in drawn] == ["run_ratio.png"]  # none of these has a limit
