"""`cox lab` from the command line: figures, files, and what is said about mistakes."""

import csv
import json

import pytest
from typer.testing import CliRunner

from coxswain.control.cli import app
from coxswain.lab.bound import Gap
from coxswain.lab.published import VTC
from coxswain.lab.report import gaps

pytestmark = pytest.mark.vllm

TRACE = "arrival_s,tenant,prompt_tokens,output_tokens\n" + "".join(
    f"{0.2 * n},{'ab'[n % 2]},{40 + n},{5 + n % 4}\n" for n in range(20)
)


@pytest.fixture
def cox(monkeypatch, tmp_path):
    """A function that calls `cox lab` with arguments; a small trace is `tiny.csv` and also stands for the real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "COX_LOG_LEVEL", "warning"
    )  # the command sets it, and must not for the tests after this
    monkeypatch.setenv("COX_TRACES", str(tmp_path))
    for name in ("tiny.csv", "vtc_arena.csv"):
        (tmp_path / name).write_text(TRACE)

    def call(*arguments):
        return CliRunner().invoke(app, ["lab", *arguments], prog_name="cox")

    return call


def test_a_run_says_what_came_of_it_and_writes_what_is_asked_for(cox, tmp_path):
    """Figures on the terminal; every request as CSV; pictures with a page around them."""
    done = cox("run", "--trace", "tiny.csv", "--plots", "out", "--requests", "each.csv")
    assert done.exit_code == 0, done.output
    assert "tiny, vtc" in done.stdout
    with (tmp_path / "each.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["delivered_tokens"]) for row in rows] == [int(row["output_tokens"]) for row in rows]
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert pictures.keys() == {"service.png", "ttft.png", "held.png", "index.html"}
    assert all(data.startswith(b"\x89PNG") for name, data in pictures.items() if name.endswith("png"))


def test_a_run_as_json_is_one_document_with_its_setup(cox):
    """What was set is in it, so that a figure can be made again."""
    done = cox(
        "run",
        "--trace",
        "tiny.csv",
        "--json",
        "--latency",
        "25ms",
        "--loss",
        "1%",
        "--outage",
        "1s+2s",
        "--weight",
        "a=3",
    )
    document = json.loads(done.stdout)
    assert document["policy"] == "vtc"
    assert document["metrics"]["n"] == document["metrics"]["done"] == 20
    setup = document["setup"]
    assert (setup["latency_s"], setup["loss"], setup["outages"]) == (0.025, 0.01, [[1.0, 2.0]])
    assert setup["tables"][1]["a"]["weight"] == 3.0


def test_a_comparison_puts_the_published_figures_beside_ours(cox):
    """On a suite that has any; always with how many were done, of how many."""
    done = cox("compare", "--suite", "real", "--policies", "fcfs,vtc:wq=2,stock-priority", "--json")
    fcfs, vtc, stock = json.loads(done.stdout)
    assert fcfs["published"]["avg_diff"] == VTC["real"]["FCFS"].avg_diff
    assert vtc["settings"] == ["wq=2"]
    assert vtc["published"] is None, "not what was published: it has other settings"
    assert stock["published"] is None
    table = cox("compare", "--suite", "real", "--policies", "fcfs").stdout
    assert "FCFS, published" in table
    assert "DONE" in table


def test_several_seeds_are_several_devices_the_same_for_all_policies(cox):
    """Every policy runs on each, a little faster or slower in turns; shown are medians, and ratios to the first."""
    done = cox("compare", "--trace", "tiny.csv", "--policies", "fcfs,vtc", "--seeds", "3", "--json")
    runs = json.loads(done.stdout)
    assert [(each["policy"], each["setup"]["seed"]) for each in runs] == [
        (policy, seed) for seed in range(3) for policy in ("fcfs", "vtc")
    ]
    assert [each["setup"]["device"]["pace"] for each in runs[::2]] == [1.0, 0.98, 1.02]
    assert len({each["metrics"]["total_s"] for each in runs if each["policy"] == "fcfs"}) == 3
    shown = cox("compare", "--trace", "tiny.csv", "--policies", "fcfs,vtc", "--seeds", "3").stdout
    assert "3 seeds: median [least … most]" in shown
    assert "1.000 [1.000 … 1.000]" in shown


def test_a_comparison_says_how_far_apart_tenants_came_and_what_the_theorem_allows(cox):
    """For every policy; or that no two wanted more than they got at once."""
    shown = cox("compare", "--trace", "tiny.csv", "--policies", "vtc").stdout
    assert "vtc: no two tenants were backlogged at once" in shown
    document = json.loads(cox("compare", "--trace", "tiny.csv", "--policies", "vtc", "--json").stdout)[0]
    assert document["gap"]["bound"] > 0
    assert document["gap"]["between"] is None


def test_classes_of_a_trace_are_rows_of_the_class_table(cox, tmp_path):
    """A trace may name classes and their SLO without anybody setting up tables."""
    (tmp_path / "classes.csv").write_text(
        "arrival_s,tenant,prompt_tokens,output_tokens,class,slo_s\n0,a,10,3,chat,\n0,a,10,3,chat,1.5\n0,a,10,3,,9\n"
    )
    classes, tenants = json.loads(cox("run", "--trace", "classes.csv", "--json").stdout)["setup"]["tables"]
    assert (classes["chat"]["slo_s"], classes["default"]["slo_s"]) == (1.5, 9.0)
    assert tenants["default"]["classes"] == ["chat"]


def test_the_suites_are_listed_with_what_was_published(cox):
    """Names to choose from, and how much of each is known."""
    listed = {row["suite"]: row for row in json.loads(cox("suites", "--json").stdout)}
    assert listed.keys() >= VTC.keys()
    assert listed["overload"]["n"] == 1620
    assert listed["real"]["n"] == 20


def test_a_result_is_told_before_files_are_written(cox, monkeypatch):
    """A disk that fills up while it runs does not lose it."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coxswain.lab.plots.draw", full)
    for arguments in (["run"], ["compare", "--policies", "fcfs"]):
        done = cox(*arguments, "--trace", "tiny.csv", "--plots", "out", "--json")
        assert done.exit_code == 1
        assert "No space left on device" in done.stderr
        assert '"done": 20' in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "no traffic: give --suite NAME"),
        (["run", "--suite", "nosuch"], "no suite 'nosuch': one of real"),
        (["run", "--suite", "overload", "--policy", "nosuch"], "no policy 'nosuch'"),
        (["run", "--trace", "none.csv"], "cannot be read"),
        (["run", "--trace", "slos.csv"], "class chat has an slo_s of 1 and of 30: one is allowed"),
        (["run", "--trace", "tiny.csv", "--device", "toaster"], "no device 'toaster'"),
        (["run", "--trace", "tiny.csv", "--admission", "free"], "no admission 'free': one of reserve, vllm"),
        (["run", "--trace", "tiny.csv", "--loss", "2"], "is not a share"),
        (["run", "--trace", "tiny.csv", "--outage", "5s"], "is not an outage"),
        (["run", "--suite", "overload,weighted"], "one suite"),
        (
            ["run", "--suite", "overload", "--requests", "none/each.csv"],
            "none/each.csv cannot be written: No such",
        ),
        (
            ["run", "--suite", "overload", "--plots", "tiny.csv/out"],
            "tiny.csv/out cannot be written: Not a dir",
        ),
        (
            ["compare", "--suite", "overload", "--plots", "tiny.csv"],
            "tiny.csv cannot be written: File exists",
        ),
        (["compare", "--trace", "tiny.csv", "--policies", "vtc,,fcfs"], "names no policy"),
    ],
)
def test_a_mistake_is_said_in_a_line_and_nothing_runs(cox, tmp_path, arguments, says):
    """What was wrong, and what is allowed."""
    (tmp_path / "slos.csv").write_text(
        "arrival_s,tenant,prompt_tokens,output_tokens,class,slo_s\n0,a,9,9,chat,1\n0,b,9,9,chat,30\n"
    )
    done = cox(*arguments)
    assert done.exit_code == 2, done.output
    assert says in " ".join(done.output.replace("│", " ").split())
    assert not done.stdout


def test_a_comparison_looks_at_every_policy_before_the_first_one_runs(cox, monkeypatch):
    """A slip in the last name does not cost the minutes that the others take."""
    monkeypatch.setattr("coxswain.lab.command.run_one", lambda *_: pytest.fail("it ran"))
    for policies, says in (
        ("fcfs,nosuch", "no policy 'nosuch'"),
        ("fcfs,vtc:wq=many", "wq=many does not fit"),
    ):
        done = cox("compare", "--trace", "tiny.csv", "--policies", policies)
        assert done.exit_code == 2, done.output
        assert says in " ".join(done.output.split())


def test_sentences_break_between_words():
    """On a narrow terminal, with what goes on indented."""
    gap = Gap(most=9.0, between=("a", "b"), bound=20.0, lower=10.0, together_s=60.0, uneven=0.01)
    first, *others = gaps({"vtc": gap}, 40).plain.split("\n")
    assert others
    assert max(map(len, (first, *others))) <= 40
    assert all(line.startswith("  ") for line in others)
    whole = gaps({"vtc": gap}, 400).plain
    assert " ".join(line.strip() for line in (first, *others)) == whole
