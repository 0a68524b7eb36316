"""States to rows on disk and back: the row format, its codecs and checksums, and the reader."""
