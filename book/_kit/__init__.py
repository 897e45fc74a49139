"""The book's kit: what chapters share and the package does not need."""
