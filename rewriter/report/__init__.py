"""What was done and what was not, as data, text and a page."""
