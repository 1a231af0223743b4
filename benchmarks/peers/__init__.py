"""Ways to decode one Llama that `whole_model.py` compares, one file each.

Each module has `prepare(model_dir, dtype)` where it needs another file format, and
`load(model_dir, dtype, threads)`, which returns a `Peer` or raises `Unavailable` with the reason.
"""
