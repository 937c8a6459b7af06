"""A recording holds what was recorded, can be read from any place, and is never written over."""

import json
from pathlib import Path

import pytest

from coxswain.control.view import recording
from coxswain.control.view.overview import Overview
from coxswain.control.view.recording import Recorder, Recording, RecordingError
from tests.support.frames import frame, request, row

NOW = 1_700_000_000.0


def recorded(path: Path, count: int = 20, full_every: int = 1) -> Path:
    """A frame a second: every request of them runs, one more in each."""
    with Recorder(path, "main", NOW) as recorder:
        for n in range(count):
            full = n % full_every == 0
            requests = tuple(request(f"r{i}") for i in range(n) if full or i == n - 1)
            made = frame("w1", "01A", n, row("a", running=n), requests=requests, full=full)
            recorder.write(made, NOW + n)
    return path


def test_a_recording_gives_the_frames_that_were_recorded(tmp_path: Path) -> None:
    """In order, with the times at which they came."""
    with Recording(recorded(tmp_path / "r.jsonl")) as played:
        assert (played.fleet, played.start, played.end) == ("main", NOW, NOW + 19)
        assert [at for at, _ in played.read(NOW + 2.5)] == [NOW, NOW + 1, NOW + 2]
        assert [each.seq for _, each in played.read(NOW + 99)] == list(range(3, 20))
        assert list(played.read(NOW + 99)) == []


@pytest.mark.parametrize("full_every", [1, 8], ids="full frames {} s apart".format)
@pytest.mark.parametrize("at", [0.0, 4.5, 12.0, 15.5, 19.0])
def test_what_is_read_from_any_place_tells_all_that_was_known_there(
    tmp_path: Path, at: float, full_every: int
) -> None:
    """A fresh overview sees what one that saw everything sees, also of a worker whose full frames come seldom."""
    pictures = []
    with Recording(recorded(tmp_path / "r.jsonl", full_every=full_every)) as played:
        for jump in (False, True):
            overview = Overview("main")
            played.seek(NOW + at if jump else NOW)
            for when, each in played.read(NOW + at):
                overview.feed(each, when)
            overview.tick(NOW + at)
            pictures.append((overview.picture(NOW + at).workers, overview.requests()))
    assert pictures[0] == pictures[1]


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    """Yesterday's incident is not lost to a slip of the finger."""
    path = recorded(tmp_path / "r.jsonl")
    before = path.read_bytes()
    with pytest.raises(RecordingError, match="exists"):
        Recorder(path, "main", NOW)
    assert path.read_bytes() == before


def test_a_recording_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """A machine that lost power leaves half a line."""
    path = recorded(tmp_path / "r.jsonl")
    path.write_bytes(path.read_bytes()[:-40])
    with Recording(path) as played:
        assert [each.seq for _, each in played.read(NOW + 99)] == list(range(19))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no recording"), (b"hello\n", "no recording"), (b'{"cox_recording":99,"fleet":"m","at":1}\n', "later"),
        (b'{"cox_recording":1,"fleet":"m","at":1}\n', "no frame"),
    ],
)  # fmt: skip
def test_what_is_no_recording_is_refused_in_words(tmp_path: Path, content: bytes, words: str) -> None:
    """Empty, something else, of a later version, or without a frame."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=words):
        Recording(path)
    with pytest.raises(RecordingError, match="cannot be read"):
        Recording(tmp_path / "nothing")


def test_any_json_tool_reads_a_recording(tmp_path: Path) -> None:
    """A head, then a line per frame as it was on the wire."""
    head, first, *_ = map(json.loads, recorded(tmp_path / "r.jsonl").read_text().splitlines())
    assert head == {"cox_recording": 1, "fleet": "main", "at": NOW}
    assert (first["at"], first["frame"]["worker"]) == (NOW, "w1")


def test_a_recording_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its limit frames are passed over, and it says so."""
    monkeypatch.setattr(recording, "MAX_BYTES", 2_000)
    with Recorder(tmp_path / "r.jsonl", "main", NOW) as recorder:
        for n in range(50):
            recorder.write(frame(seq=n), NOW + n)
        assert recorder.full
        assert recorder.frames < 10
    assert (tmp_path / "r.jsonl").stat().st_size < 4_000
