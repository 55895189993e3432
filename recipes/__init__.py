"""YAML recipes, one folder per method; each has a README with measured numbers."""
