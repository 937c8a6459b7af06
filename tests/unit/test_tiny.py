"""The tiny model's files; what it says when served is tested in `integration/test_identity_http.py`."""

import hashlib
from pathlib import Path

import pytest

tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.numpy")

from coxswain.service import tiny  # noqa: E402


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    """One seed gives the same files twice, another seed other weights and the same tokenizer."""
    first = digests(tiny.make_model(tmp_path / "a", seed=7, hidden=64))
    again = digests(tiny.make_model(tmp_path / "b", seed=7, hidden=64))
    other = digests(tiny.make_model(tmp_path / "c", seed=8, hidden=64))
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["tokenizer.json"] == other["tokenizer.json"]


def test_existing_model_is_kept_and_another_shape_replaces_it(tmp_path: Path) -> None:
    """The same parameters write nothing again; others replace the model whole."""
    folder = tiny.make_model(tmp_path / "m", hidden=64)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    tiny.make_model(folder, hidden=64)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    tiny.make_model(folder, hidden=64, layers=1)
    assert "model.layers.1.mlp.up_proj.weight" not in safetensors.load_file(folder / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """A folder that is not such a model is never overwritten."""
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        tiny.make_model(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(("hidden", "layers", "seed"), [(100, 2, 0), (0, 2, 0), (64, 0, 0), (64, 1, -1)])
def test_impossible_shape_is_refused(tmp_path: Path, hidden: int, layers: int, seed: int) -> None:
    """A shape that no model has is refused in words, and nothing is written."""
    with pytest.raises(ValueError, match="multiple of 64"):
        tiny.make_model(tmp_path / "m", hidden=hidden, layers=layers, seed=seed)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("text", ["The captain will steer.", " hold the oar", "Größe: 3 ☃\n", "<|user|>x"])
def test_any_text_goes_in_and_comes_out(tmp_path: Path, text: str) -> None:
    """Tokenizing and detokenizing gives the text back; known words are one token."""
    tokenizer = tokenizers.Tokenizer.from_file(
        str(tiny.make_model(tmp_path / "m", hidden=64) / "tokenizer.json")
    )
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode(" hold the oar").ids) == 3


def test_only_words_can_be_chosen(tmp_path: Path) -> None:
    """The output layer is zero for bytes and special tokens, so that they never win against a word."""
    folder = tiny.make_model(tmp_path / "m", hidden=64)
    head = safetensors.load_file(folder / "model.safetensors")["lm_head.weight"]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    spoken = [tokenizer.decode([number]) for number in range(len(head)) if head[number].any()]
    assert len(spoken) > 900
    assert all(text in ",." or text.strip().isalpha() for text in spoken)
    assert tokenizer.token_to_id("<|end|>") == 1
    assert not head[1].any()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the folder; a refusal goes to stderr with exit code 2."""
    assert tiny.main([str(tmp_path / "m"), "--hidden", "64", "--layers", "1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm'}\n"
    assert tiny.main([str(tmp_path / "n"), "--hidden", "65"]) == 2
    assert "multiple of 64" in capsys.readouterr().err
