"""File to shard to passages: inputs, formats and the deterministic plan of shards.

Every decision about somebody else's file is made in one place:

* which files an input stands for, and the format of each: `inputs.expand_inputs`;
* how it is opened, and how it is compressed: `access.open_text`;
* the class that reads a format: `scans.READERS`;
* header, column names and quoting of a text file, from its first rows: `text_detect.detect`;
* the types of the columns of a columnar file: `columnar.ColumnarFile.choose_fields`;
* the fields that make a passage: `passages.FieldOptions.detect`;
* whether a row is a passage or a reject: `text.parse_all` and `passages.to_passage`.
"""
