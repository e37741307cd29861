"""anyrank's entry points for Flower."""
