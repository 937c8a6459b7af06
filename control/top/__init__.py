"""The screen of `cox top`: textual draws, `control/view/overview.py` knows. Needs the extra `top`.

Rooms: `columns` (what each table shows and how it sorts; pure), `table` (one widget for all of them), `lines` (the
first line, and what happened; pure), `sources` (a live fleet or a recording), `dialogs` (what asks before it acts, and
a request's story), `steering` (commands and what became of them), `app` (the screen and its keys). Called by
`cli/top.py` only.
"""
