"""A model's folder: finding and fetching it, config.json, reading weights into layers."""
