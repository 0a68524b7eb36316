"""How a corpus differs from a table, found by workers in bounded memory.

`corpus` says what is read, `sides` writes what tells passages and rows apart by hash, `join`
compares one partition of both, `differences` keeps what was found in files, and `compare` does all
of it.
"""
