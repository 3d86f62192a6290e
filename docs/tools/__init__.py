"""What `mkdocs build` runs beside its plugins; no page of the site."""
