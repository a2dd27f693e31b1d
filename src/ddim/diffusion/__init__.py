"""The mathematics of diffusion models: schedules, equations, the sampling loop, inversion."""
