"""``moe-fused tune``: the searches, the table that it writes, and what it times on a GPU."""
