"""Work split over devices beyond what automatic sharding does: pipeline schedules and the program that runs them."""
