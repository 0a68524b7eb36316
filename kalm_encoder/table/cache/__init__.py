"""A cache of states on the local disk, for tables on object stores; several processes share it."""
