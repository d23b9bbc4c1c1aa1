"""Networks that read neural graphs."""
