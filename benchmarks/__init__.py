"""What the book's tables are made from: `python -m benchmarks.NAME [--json FILE] [--quick]`."""
