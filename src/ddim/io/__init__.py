"""Files: configurations, weights, images, latents, the hub, caches."""
