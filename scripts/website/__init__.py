"""The documentation site: which pages it has beside those of `docs/`, and how their text becomes that of a site."""
