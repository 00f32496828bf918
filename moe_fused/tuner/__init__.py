"""``moe-fused tune``: the search, the table it writes, and what it times on a GPU."""
