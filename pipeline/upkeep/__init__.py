"""Maintains a table after it was encoded.

`facts` describes it, `verify` checks it, `sync` brings it up to date with its corpus as `compare`
finds, `truncate` makes a smaller one of it, `delete` removes passages and compacts, and `garbage`
removes what nobody needs.
"""
