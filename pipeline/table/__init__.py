"""The table while it is made: fragments, commits, the seal and the published version.

`fragments` writes rows that no version names yet. `claim` says which process may commit, `ledger`
which shards are done, `committer` when to commit. `finish` settles repeated ids (`duplicates`),
merges fragments (`compaction`) and indexes (`indexes`), and `publish` moves the tag `live`. `preflight` tries the store,
`rejects` keeps the rows that were not encoded, and `side_files` names all files beside the rows.
"""
