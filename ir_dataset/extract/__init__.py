"""Bitcode out of real builds: the hook in the compiler's place, what it leaves, and the sandbox."""
