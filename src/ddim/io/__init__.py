"""Files: configurations, weights, images, latent codes, the hub, caches."""
