"""The page that a controller serves: `cox controller --web`. Read-only, the picture of `cox top` in a browser.

`board.py` makes the picture, `page.py` decides when and for whom, `site.py` speaks HTTP; `static/` is the page
itself. Only `site.py` needs the extra `web`.
"""
