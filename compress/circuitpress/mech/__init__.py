"""Mechanisms: which parts of a model do what, and how sure that is.

`circuits` finds and verifies the parts that a behavior needs, `sae` learns and reads directions of a site, `lens` shows
what a model attends to, writes and could predict at every depth. `sites` are the places all of them read and change.
"""
