"""More than one device or host: what each of them does."""
