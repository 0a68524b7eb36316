"""File to shard to passages: inputs, formats and the deterministic plan of shards.

Every decision about somebody else's file is made in one place:

* its format, from its name: `inputs.file_format`; the class that reads a format: `shards.READERS`;
* header, column names and quoting of a text file, from its first rows: `text.detect`;
* the fields that make a passage: `passages.FieldOptions.detect`;
* whether a row is a passage or a reject: `text.parse_all` and `passages.to_passage`.
"""
