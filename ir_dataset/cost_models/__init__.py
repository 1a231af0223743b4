"""Cost models: what code takes in bytes and in time, told before it is compiled or run."""
