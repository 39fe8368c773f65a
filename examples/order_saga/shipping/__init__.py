"""Ships to the countries that it serves."""
