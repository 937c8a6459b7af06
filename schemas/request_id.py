"""A request's public id, by which every command, report and event names it. Pure text work.

Called by the scheduler, which makes it of vLLM's internal id (`service/request_id.py`), and by the control side, where
a person may give the id in a response's body instead.
"""

import re
from typing import Final

MARK: Final = "cox."
"""How a signed id begins."""
MAX_CHARS: Final = 512
"""Longest public id; a signed one has at most 497 characters, a client's own is cut."""

_SIGNED = re.compile(
    # The end is checked too: a signature with more letters behind it was altered.
    r"(cox\.([A-Za-z0-9_~%-]{1,384})\.([a-z0-9_-]{0,64})\.[0-9A-HJKMNP-TV-Z]{26})\.([0-9a-f]{16})(?![0-9A-Za-z.])",
)
# What vLLM puts before the id that a client sent, in the `id` of a response's body.
_PREFIX: Final = ("chatcmpl-", "cmpl-", "resp_", "generate-tokens-")
_PREFIXES = re.compile(r"\A(?:chatcmpl-|cmpl-|resp_|generate-tokens-)+")
_UNPRINTABLE: Final = {code: f"\\x{code:02x}" for code in range(128) if not chr(code).isprintable()}


def normalise(text: str) -> str:
    """The public id that a command means by `text`: that id itself, or the `id` in a response's body.

    `parse(…).request` is always normal, so that the two can be compared; normalising twice changes nothing.
    """
    match = last_signed(text)
    if match is not None:
        return match[0]
    if text.startswith(_PREFIX):
        text = _PREFIXES.sub("", text, count=1)
    if not (text.isascii() and text.isprintable()):
        text = text.encode("ascii", "backslashreplace").decode().translate(_UNPRINTABLE)
    if len(text) <= MAX_CHARS:
        return text
    # A cut may bare a mark that more letters hid: look once more, so that the answer is a fixed point.
    return normalise(text[:MAX_CHARS])


def last_signed(text: str) -> re.Match[str] | None:
    """The last signed id in any longer text; its groups: what is signed, tenant (percent-encoded), class, signature."""
    # A signed id shows the mark up to three times: at its start, and where a tenant's or class's name ends in
    # "cox". From such an end too few parts follow to be an id, so the first match from the right is the last id.
    at = len(text)
    for _ in range(3):
        at = text.rfind(MARK, 0, at)
        if at < 0:
            return None
        match = _SIGNED.match(text, at)
        if match is not None:
            return match
    return None
