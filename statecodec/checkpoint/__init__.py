"""An open checkpoint, compressed or not: what it holds, and its bytes."""
