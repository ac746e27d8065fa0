"""People compare answers of a model in the browser; what they say becomes preferences for the reward model."""
