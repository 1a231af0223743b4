"""The pass protocol and the pipeline that runs it."""
