"""What a rewrite costs in quality: on tasks, on texts, beside controls at equal bytes."""
