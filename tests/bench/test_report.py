"""What becomes of the rows: a table, a file, a page and pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from polyak.bench import Report, Row
from polyak.bench.fit import fit, lines
from polyak.bench.page import filled, main, markdown
from polyak.bench.picture import draw
from polyak.bench.report import Quantiles
from polyak.bench.table import caption, summaries, tables
from polyak.errors import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs"
MACHINE = "Pocket Calculator 3000 (1 core), 1 threads"


def row(subject: str, ratio: float, **fields) -> Row:
    group = "polyak" if subject.startswith("polyak") else "limit" if subject.startswith("flat") else "library"
    measured = {"ratio": Quantiles.of([ratio]), "milliseconds": Quantiles.of([10 * ratio]), "reference": "timm-v3"}
    return Row(**{"case": "update", "model": "net", "subject": subject, "group": group, **measured, **fields})


def grown(subject: str, tensors: int, milliseconds: float) -> Row:
    times = Quantiles.of([milliseconds])
    named = {"case": "scaling", "model": "tensors of 64 values", "setting": f"{tensors} tensors"}
    return Row(**named, subject=subject, group="polyak", milliseconds=times, tensors=tensors, values=64 * tensors)


@pytest.fixture
def report():
    update = [
        row("polyak auto", 0.5, peak=1 << 20, limit=Quantiles.of([1.25])),
        row("timm-v3", 1.0),
        row("flat lerp_", 0.4),
        Row(case="update", model="net", subject="polyak fused", group="polyak", remark="needs a compiler"),
    ]
    scaling = [grown("polyak auto", count, 2.0 + 0.5 * count) for count in (10, 100, 1000)]
    left_out = Row(
        case="scaling", model="tensors of 64 values", setting="10,000 tensors", subject="-", group="limit",
        remark="not measured: it needs 99.0 GiB of memory",
    )  # fmt: skip
    return Report(
        machine=MACHINE, memory="by hand", versions={"polyak": "1"}, settings={}, rows=[*update, *scaling, left_out]
    )


def test_quantiles_are_those_of_the_samples():
    assert Quantiles.of([float(value) for value in range(101)]) == Quantiles(
        low=5, first=25, median=50, third=75, high=95, count=101
    )


def test_a_table_has_a_row_for_each_subject_and_no_empty_columns(report):
    update, _ = tables(report)

    assert update.head == ("model", "subject", "ms", "× timm-v3", "× limit", "extra memory", "remark")
    assert update.rows[0] == ("net", "polyak auto", "5.00", "0.500 (0.500–0.500)", "1.25", "1.0 MiB", "-")
    assert update.rows[3] == ("net", "polyak fused", "-", "-", "-", "-", "needs a compiler")


def test_a_summary_has_a_row_for_each_model_and_a_column_for_each_subject_that_most_readers_look_for(report):
    (update,) = summaries(report)

    assert update.case == "update"
    assert update.head == ("model", "polyak auto", "timm-v3", "flat lerp_")
    assert update.rows == [("net", "0.500", "10.0 ms", "0.400")]


def test_a_summary_tells_settings_shares_and_what_was_not_measured(report):
    share = Quantiles.of([0.02])
    rows = [
        row("2 averagers", 1.0, setting="2 averages", reference="2 averagers"),
        row("polyak bank", 0.8, setting="2 averages", reference="2 averagers"),
        row("4 averagers", 1.0, setting="4 averages", reference="4 averagers", disturbed=0.9),
        row("torch", 1.0, setting="4 averages", reference="4 averagers", share=share),
    ]
    (summary,) = summaries(report.model_copy(update={"rows": rows}))

    assert summary.head == ("model", "setting", "reference", "polyak bank", "torch")
    assert summary.rows == [
        ("net", "2 averages", "10.0 ms", "0.800", "-"),
        ("net", "4 averages", "10.0 ms", "-", "2.00 %"),
    ]
    assert "90 %" in summary.notes[0]


def test_models_that_grow_are_a_line_with_its_intercept_and_what_was_left_out_is_told(report):
    _, scaling = tables(report)

    assert scaling.rows[0][-1] == "2,000 µs + 500,000 ns per tensor"
    assert scaling.notes == ["tensors of 64 values, 10,000 tensors: not measured: it needs 99.0 GiB of memory."]


def test_the_line_is_nearest_in_relative_terms():
    assert fit([1, 10, 100, 1000], [1.0, 10.0, 100.0, 1000.0]) == pytest.approx((0, 1), abs=1e-9)
    fixed, each = fit([1, 10, 100, 1000], [5.0, 6.0, 15.0, 500.0])
    assert fixed == pytest.approx(5, rel=0.2)
    assert 0.1 < each < 0.5
    assert fit([4], [2.0]) == (0.0, 0.5)


def test_lines_are_made_of_the_rows_of_one_subject(report):
    (line,) = lines([one for one in report.rows if one.case == "scaling"])

    assert line.counts == [10, 100, 1000]
    assert (line.fixed, line.each) == pytest.approx((2.0, 0.5))


def test_the_machine_and_how_memory_was_measured_are_told(report):
    told = "\n".join(caption(report))
    assert MACHINE in told
    assert "by hand" in told
    assert "not measured" in "\n".join(caption(report.model_copy(update={"memory": ""})))


def test_rows_that_others_disturbed_are_said_to_be(report):
    noisy = report.model_copy(update={"rows": [row("polyak auto", 0.5, disturbed=0.9)]})
    assert "90 %" in tables(noisy)[0].notes[0]


def test_a_report_is_read_back_as_it_was_written(report, tmp_path):
    report.write(tmp_path / "a.json")

    assert Report.read(tmp_path / "a.json") == report
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", None])
def test_a_file_that_is_no_report_is_refused(text, tmp_path):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match="is no report of polyak bench"):
        Report.read(file)


PAGE = "# Speed\n<!-- bench: update -->\nold\n<!-- /bench -->\nkept\n<!-- bench: host -->\nolder\n<!-- /bench -->\n"


def test_a_page_gets_the_tables_that_there_are_and_keeps_the_rest(report):
    page = filled(PAGE, [report])

    assert markdown(tables(report)[0]) in page
    assert "| net | polyak auto | 5.00 | 0.500 (0.500–0.500) | 1.25 | 1.0 MiB | - |" in page
    assert "old\n<" not in page
    assert "kept" in page
    assert "older" in page
    assert filled(page, [report]) == page


@pytest.mark.parametrize(
    ("name", "saved"),
    [("performance.md", "performance"), ("performance-tables.md", "performance"), ("performance-gpu.md", "gpu")],
)
def test_the_pages_of_the_documentation_show_what_the_saved_reports_say(name, saved):
    reports = [Report.read(file) for file in sorted((DOCS / "assets").glob(f"{saved}-*.json"))]
    page = (DOCS / name).read_text(encoding="utf-8")

    assert reports
    assert filled(page, reports) == page


def test_pages_and_pictures_are_made_from_files(report, tmp_path):
    page, short = tmp_path / "performance.md", tmp_path / "short.md"
    page.write_text(PAGE + "<!-- bench: machine -->\n<!-- /bench -->\n")
    short.write_text("<!-- bench: update-summary -->\n<!-- /bench -->\n")
    report.write(tmp_path / "speed.json")

    main(page, short, tmp_path / "speed.json")

    assert MACHINE in page.read_text()
    assert markdown(summaries(report)[0]) in short.read_text()
    pictures = sorted(file.name for file in tmp_path.glob("*.png"))
    assert pictures == ["speed-scaling.png", "speed-update.png"]
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 700
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_one_case_is_one_picture_under_the_name_that_was_given(report, tmp_path):
    alone = report.model_copy(update={"rows": report.rows[:4]})
    assert draw(alone, tmp_path / "one.png") == [tmp_path / "one.png"]


def test_a_case_in_which_nothing_was_measured_has_no_picture(report, tmp_path):
    nothing = report.model_copy(update={"rows": report.rows[3:4]})
    assert draw(nothing, tmp_path / "one.png") == []


def test_a_report_of_a_busy_machine_goes_into_no_page_unless_it_is_asked_for(report, tmp_path):
    page, file = tmp_path / "performance.md", tmp_path / "speed.json"
    page.write_text(PAGE)
    report.model_copy(update={"rows": [row("polyak auto", 0.5, disturbed=0.9)]}).write(file)
    with pytest.raises(ConfigError, match=r"speed.json: .*up to 90 %.* --busy takes it all the same"):
        main(page, file)
    assert page.read_text() == PAGE
    assert not list(tmp_path.glob("*.png"))
    main(page, file, busy=True)
    assert page.read_text() != PAGE


def test_no_pages_no_reports_and_pages_that_are_not_there_are_said(report, tmp_path):
    report.write(tmp_path / "speed.json")
    for given in ((), (tmp_path / "speed.json",), (tmp_path / "page.md",)):
        with pytest.raises(ConfigError, match=r"expected PAGE.md … REPORT.json …"):
            main(*given)
    with pytest.raises(FileNotFoundError, match="there is no page"):
        main(tmp_path / "page.md", tmp_path / "speed.json")
