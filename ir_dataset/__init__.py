"""LLVM IR collected into a dataset, and cost models from it. Nothing here yet."""
