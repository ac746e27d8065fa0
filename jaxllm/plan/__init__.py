"""What can be known before a chip is rented."""
