"""`kalm evaluate`: how well the stored states rank, and what they cost, on judged queries.

In the order of the work: `collection` reads queries and judgements, `experiment` encodes and ranks,
`rankings` writes TREC run files and has them measured, `judging` and `statistics` compare the
settings, `results` is what was found, `findings` says what may be claimed of it, and `report` shows
it with the pictures of `figures` and `tradeoff_figure`. `run_figure` draws the runs of a table for
`kalm status`, and `mteb_search` lets mteb evaluate from stored states.
"""
