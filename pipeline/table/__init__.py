"""The table while it is made: fragments, commits, the seal and the published version.

`fragments` writes rows that no version names yet. `claim` says which process may commit, `ledger`
which shards are done, `committer` when to commit. `finish` settles repeated ids (`duplicates`),
merges fragments (`compaction`) and builds indexes (`indexes`); `publish` moves the tag `live`.
Workers do these `steps` part by part, and exchange rows in `partitions` by hash. `preflight` tries
the store, `rejects` keeps the rows that were not encoded, and `side_files` names all files beside
the rows.
"""
