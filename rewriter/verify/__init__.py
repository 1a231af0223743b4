"""Every rewrite against what it claims to compute."""
