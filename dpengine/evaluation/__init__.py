"""Images of released weights: drawn, shown and scored."""
