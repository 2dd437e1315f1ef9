"""Edits of many requests at a time: a queue, batches that go on step by step, and the servers in front of them."""
