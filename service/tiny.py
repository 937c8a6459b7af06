"""A small seeded Llama with a real tokenizer: text in, words out, a second to make, nothing to download.

For the demo, the tests and first steps on a laptop; it knows nothing and says so in plain English words.
Three properties are built in: greedy output is varied and depends on the whole context (wrong KV changes the
words), logits lie far apart (batching cannot flip a token), and only words and punctuation are ever chosen.

    python -m coxswain.service.tiny PATH [--seed N] [--hidden N] [--layers N]

Needs numpy, tokenizers and safetensors, which every vLLM brings; never imports vLLM or torch.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from coxswain.service.tiny_words import WORDS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT: Final = 1
"""Raised when the same parameters give other files than before."""
MARKER: Final = "tiny.json"
HEAD: Final = 32
"""Size of one attention head: the smallest that vLLM's CPU attention takes."""
SPECIALS: Final = ("<|begin|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>")
PUNCTUATION: Final = (",", ".")
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides the model's bytes."""

    seed: int = 0
    hidden: int = 128
    """Width; a multiple of 64."""
    layers: int = 2
    max_len: int = 4096
    """Longest context in tokens."""
    format: int = FORMAT

    @property
    def heads(self) -> int:
        """Query heads; half as many for keys and values."""
        return self.hidden // HEAD

    @property
    def inner(self) -> int:
        """Width of the feed-forward layer."""
        return self.hidden * 2


def make_model(
    path: str | Path, *, seed: int = 0, hidden: int = 128, layers: int = 2, max_len: int = 4096
) -> Path:
    """Write the model in Hugging Face format to `path`, unless it is already there with this shape.

    Args:
        path: the folder; made with its parents. A folder with other files in it is refused.
        seed: another seed, another model; the same one gives the same bytes.
        hidden: width, a multiple of 64.
        layers: depth.
        max_len: longest context in tokens.

    Returns:
        The folder.

    Raises:
        ValueError: if the shape is impossible, or the folder holds something that is not such a model.
    """
    shape = Shape(seed=seed, hidden=hidden, layers=layers, max_len=max_len)
    if hidden < 2 * HEAD or hidden % (2 * HEAD) or layers < 1 or max_len < 1 or seed < 0:
        raise ValueError(
            f"no model of shape {shape}: hidden is a multiple of {2 * HEAD}, layers and max_len are "
            "positive, seed is not negative",
        )
    folder = Path(path)
    marker = folder / MARKER
    if marker.is_file() and marker.read_bytes() == msgspec.json.encode(shape):
        return folder
    if folder.exists() and any(folder.iterdir()) and not marker.is_file():
        raise ValueError(f"{folder} holds other files: name a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved, so that a model is whole or not there at all.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        _write_tokenizer(made, shape)
        _write_config(made, shape)
        _write_weights(made, shape)
        (made / MARKER).write_bytes(msgspec.json.encode(shape))
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _vocabulary() -> dict[str, int]:
    """Token to id: special tokens, all 256 bytes (so that any text goes in), then words.

    A word stands with a leading space (`Ġ` in byte-level alphabets), as it does inside a sentence.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(f"Ġ{word}" for word in WORDS)]
    return {token: number for number, token in enumerate(tokens)}


def _spoken() -> list[int]:
    """The ids that the model may choose: words and a little punctuation; never bytes or special tokens."""
    vocabulary = _vocabulary()
    return [vocabulary[token] for token in (*(f"Ġ{word}" for word in WORDS), *PUNCTUATION)]


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Byte-level BPE without merges: with ignore_merges (as in Llama 3) a known word is one token, and any
    # other is spelled in bytes. No half-words enter the vocabulary.
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIALS[0],
            "eos_token": SPECIALS[1],
            "pad_token": SPECIALS[1],
            "model_max_length": shape.max_len,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_config(folder: Path, shape: Shape) -> None:
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "float32",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads // 2,
            "head_dim": HEAD,
            "hidden_act": "silu",
            "max_position_embeddings": shape.max_len,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "vocab_size": len(_vocabulary()),
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    )
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _write_weights(folder: Path, shape: Shape) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file(
        dict(_weights(shape, np.random.default_rng(shape.seed))),
        folder / "model.safetensors",
        {"format": "pt"},
    )


def _weights(shape: Shape, random: "np.random.Generator") -> "Iterator[tuple[str, NDArray[np.float32]]]":
    """Every tensor, drawn in a fixed order.

    Attention writes more into the residual stream than the token's own embedding does, and its scores are
    spread out: the next word depends on the whole context, not on the last word, so greedy output does not
    fall into a short loop and a wrong KV block shows.
    """
    import numpy as np

    size = len(_vocabulary())
    key_value = shape.heads // 2 * HEAD

    def normal(rows: int, columns: int, gain: float) -> "NDArray[np.float32]":
        # `gain` is what the matrix does to the length of a vector of independent entries.
        drawn = random.standard_normal((rows, columns), dtype=np.float32)
        return (drawn * np.float32(gain / columns**0.5)).astype(np.float32)

    ones = np.ones(shape.hidden, dtype=np.float32)
    yield "model.embed_tokens.weight", normal(size, shape.hidden, shape.hidden**0.5)
    for layer in range(shape.layers):
        root = f"model.layers.{layer}."
        yield root + "input_layernorm.weight", ones.copy()
        yield root + "self_attn.q_proj.weight", normal(shape.heads * HEAD, shape.hidden, 1.5)
        yield root + "self_attn.k_proj.weight", normal(key_value, shape.hidden, 1.5)
        yield root + "self_attn.v_proj.weight", normal(key_value, shape.hidden, 2.0)
        yield root + "self_attn.o_proj.weight", normal(shape.hidden, shape.heads * HEAD, 2.0)
        yield root + "post_attention_layernorm.weight", ones.copy()
        yield root + "mlp.gate_proj.weight", normal(shape.inner, shape.hidden, 1.5)
        yield root + "mlp.up_proj.weight", normal(shape.inner, shape.hidden, 1.5)
        yield root + "mlp.down_proj.weight", normal(shape.hidden, shape.inner, 1.5)
    yield "model.norm.weight", ones.copy()
    # Logits of spoken tokens have a standard deviation of 6; all others are exactly 0 and never win.
    head = np.zeros((size, shape.hidden), dtype=np.float32)
    spoken = _spoken()
    head[spoken] = normal(len(spoken), shape.hidden, 6.0)
    yield "lm_head.weight", head


def main(argv: list[str] | None = None) -> int:
    """Make the model that the arguments describe; print its folder."""
    shape = Shape()
    parser = argparse.ArgumentParser(
        prog="python -m coxswain.service.tiny", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("path", help="folder to write to")
    parser.add_argument("--seed", type=int, default=shape.seed)
    parser.add_argument(
        "--hidden", type=int, default=shape.hidden, help="width, a multiple of 64 (default %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=shape.layers, help="depth (default %(default)s)")
    parser.add_argument(
        "--max-len", type=int, default=shape.max_len, help="longest context, tokens (default %(default)s)"
    )
    chosen = parser.parse_args(argv)
    try:
        folder = make_model(
            chosen.path,
            seed=chosen.seed,
            hidden=chosen.hidden,
            layers=chosen.layers,
            max_len=chosen.max_len,
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
