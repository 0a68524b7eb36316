"""Shard to tokens to states to an uncommitted fragment, on one device."""
