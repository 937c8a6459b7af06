"""Traffic of the lab: trace files, and suites that are their authors' to the last digit."""

from pathlib import Path

import pytest

from coxswain.lab import suites
from coxswain.lab.published import VTC, peer
from coxswain.lab.suites import SUITES
from coxswain.lab.trace import Arrival, TraceError, read, slos, tenants

HEAD = "arrival_s,tenant,prompt_tokens,output_tokens"


@pytest.fixture
def trace(tmp_path):
    """A function that writes a trace file."""

    def write(text):
        path = tmp_path / "trace.csv"
        path.write_text(text)
        return path

    return write


def test_a_trace_is_read_in_order_of_time(trace):
    """Lines may stand in any order; class and SLO are optional."""
    path = trace(f"{HEAD},class,slo_s\n2.5,b,3,4,chat,1.5\n1,a,1,2,,\n")
    assert read(path) == (
        Arrival(at_s=1.0, tenant="a", prompt_tokens=1, output_tokens=2),
        Arrival(at_s=2.5, tenant="b", prompt_tokens=3, output_tokens=4, class_="chat", slo_s=1.5),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arrival_s,tenant\n1,a\n", "prompt_tokens, output_tokens is missing"),
        (f"{HEAD},colour\n1,a,1,1,red\n", "unknown column colour: allowed are arrival_s"),
        (f"{HEAD}\n", "has no arrivals"),
        (f"{HEAD}\n1,a,1,1\n1,a,x,1\n", "line 3"),
        (f"{HEAD}\n-1,a,1,1\n", "line 2: a time from 0"),
        (f"{HEAD}\n1,a,0,1\n", "at least one token"),
        (f"{HEAD}\nnan,a,1,1\n", "line 2"),
        (f"{HEAD}\n1,,1,1\n", "line 2"),
        (f"{HEAD},class\n1,a,1,1,No Class\n", "line 2"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_its_place(trace, text, says):
    """A column, a line, a value: whoever made the file can mend it."""
    with pytest.raises(TraceError, match=says):
        read(trace(text))


def test_an_slo_is_its_classs_and_without_a_class_that_of_default(trace):
    """One line of a class is enough to say it."""
    path = trace(f"{HEAD},class,slo_s\n0,a,1,1,chat,30\n1,b,1,1,chat,\n2,a,1,1,batch,\n3,a,1,1,,2\n")
    assert slos(read(path)) == {"chat": 30.0, "default": 2.0}


@pytest.mark.parametrize("class_", ["chat", ""])
def test_two_slos_in_a_class_are_refused(trace, class_):
    """The second one would be for nothing."""
    path = trace(f"{HEAD},class,slo_s\n0,a,1,1,{class_},1\n0,b,1,1,{class_},30\n")
    with pytest.raises(TraceError, match=f"class {class_ or 'default'} has an slo_s of 1 and of 30"):
        slos(read(path))


def test_a_trace_that_is_not_there_is_said(tmp_path):
    """Not a traceback."""
    with pytest.raises(TraceError, match="cannot be read"):
        read(tmp_path / "none.csv")


def test_tenants_are_counted_as_people_do():
    """c2 comes before c10."""
    arrivals = [Arrival(at_s=0, tenant=name, prompt_tokens=1, output_tokens=1) for name in ("c10", "c2", "a")]
    assert tenants(arrivals) == ["a", "c2", "c10"]


@pytest.mark.parametrize("name", [name for name, suite in SUITES.items() if suite.make and name in VTC])
def test_a_suite_has_as_many_requests_as_its_published_runs(name):
    """The number of requests is that of the authors' result logs."""
    count = len(SUITES[name].arrivals())
    assert VTC[name]
    assert {row.n for row in VTC[name].values()} == {count}


def test_arrivals_are_the_authors_to_the_last_digit():
    """The first arrivals of committed result logs (overload-weighted, WVTC and VTC)."""
    first = [(arrival.at_s, arrival.tenant) for arrival in SUITES["weighted"].arrivals()[:2]]
    assert first == [(0.9991615526231479, "c3"), (1.4433282848428375, "c2")]
    assert SUITES["overload-weighted"].arrivals()[3].at_s == 1.7181751485592032


def test_another_seed_gives_another_traffic_and_the_same_seed_the_same():
    """Suites are random only by their seed."""
    suite = SUITES["poisson_short_long"]
    assert suite.arrivals() == suite.arrivals()
    assert suite.arrivals(seed=1) != suite.arrivals()


def test_a_suite_from_a_file_says_where_it_looks(monkeypatch, tmp_path):
    """Without the file: which, how to give it, and where it is documented."""
    monkeypatch.delenv(suites.FOLDER_VARIABLE, raising=False)
    with pytest.raises(TraceError, match=r"--trace PATH.*COX_TRACES"):
        SUITES["real"].arrivals()
    monkeypatch.setenv(suites.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(TraceError, match=r"vtc_arena\.csv does not exist"):
        SUITES["real"].arrivals()
    Path(tmp_path / "vtc_arena.csv").write_text(f"{HEAD}\n1,a,1,1\n")
    assert len(SUITES["real"].arrivals()) == 1


def test_our_policies_have_their_published_peers():
    """What stands beside ours did the same thing on the same suite."""
    assert peer("real", "rpm20")[0] == "RPM20"
    assert peer("weighted", "vtc")[0] == "WVTC"
    assert peer("real", "vtc:predict=average")[0] == "VTC_predict"
    assert peer("overload", "fcfs") is None
    assert peer("real", "vtc:wq=3") is None
