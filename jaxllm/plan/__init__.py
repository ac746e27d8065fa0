"""Plans: what a run would need and cost, before any chip is rented."""
