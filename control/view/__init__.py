"""What people see of a fleet: `cox top`, its recordings, and the page. Pure but for `recording.py`, which has a file.

`overview.py` makes a `picture.py` of status frames, with the help of `chronicle.py` and `recent.py`.
"""
