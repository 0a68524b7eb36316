"""A process that takes rows through a disk cache, for tests of several processes.

python -m tests.support.cache_reader TABLE FOLDER BYTES SEGMENT_BYTES takes all rows, prints how
many it found in the cache, and does so again for every line that it reads.
"""

import sys

from kalm_encoder import DiskCache, PassageTable
from kalm_encoder.table.cache import cached_table, disk_cache

AT_ONCE = 20


def main() -> None:
    uri, folder, max_bytes, segment_bytes = sys.argv[1:]
    cached_table.RESCAN_S, disk_cache.SEGMENT_BYTES = 0.0, int(segment_bytes)
    cache = DiskCache(folder, int(max_bytes))
    table, plain = PassageTable.open(uri, disk_cache=cache), PassageTable.open(uri)
    ids = plain.dataset.to_table(columns=["id"])["id"].to_pylist()
    right = [p.states.tobytes() for p in plain.take(ids)]
    for _ in sys.stdin:
        hits, _ = cache.lookups
        taken = []
        for start in range(0, len(ids), AT_ONCE):
            taken += table.take(ids[start : start + AT_ONCE])
        assert [p.states.tobytes() for p in taken] == right
        sys.stdout.write(f"{cache.lookups[0] - hits}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
