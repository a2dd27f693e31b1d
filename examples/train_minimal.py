"""Train a tiny denoiser on scikit-learn's 8x8 digits and sample from it, with the equations and the scheduler alone.

The whole of denoising diffusion: noise an image, learn to tell the two apart, step back. `ddim train` adds data
loading, averaged weights, checkpoints, evaluation and several processes.

    python examples/train_minimal.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddim import DDIMScheduler
from ddim.diffusion.equations import add_noise, training_target


class Denoiser(nn.Module):
    """A perceptron on flattened 8x8 images that predicts v, a mixture of image and noise."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, 6, 16)))
        layers = [nn.Linear(64 + 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64)]
        self.layers = nn.Sequential(*layers)

    def forward(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        """Predict v from `sample` (N, 1, 8, 8) at `timesteps` (N,)."""
        angles = timesteps[:, None] / 1000 * self.frequencies
        features = torch.cat([sample.flatten(1), angles.sin(), angles.cos()], 1)
        prediction: Tensor = self.layers(features)
        return prediction.view_as(sample)


def train(images: Tensor, scheduler: DDIMScheduler, num_steps: int = 1000, batch_size: int = 128) -> Denoiser:
    """Minimize DDPM's simple loss on `images` (N, 1, 8, 8) in [-1, 1], printing it now and then."""
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(num_steps):
        x0 = images[torch.randint(len(images), (batch_size,))]
        noise = torch.randn_like(x0)
        timesteps = torch.randint(len(scheduler), (batch_size,))
        alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        target = training_target(x0, noise, alpha, scheduler.config.prediction_type)
        loss = (model(add_noise(x0, noise, alpha), timesteps) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (num_steps // 5) == 0 or step == num_steps - 1:
            print(f"step {step}: loss {float(loss.detach()):.3f}")
    return model


@torch.no_grad()
def generate(model: Denoiser, scheduler: DDIMScheduler, count: int, num_inference_steps: int = 50) -> Tensor:
    """Sample `count` images, (count, 1, 8, 8) in about [-1, 1], by DDIM."""
    scheduler.set_timesteps(num_inference_steps)
    x = torch.randn(count, 1, 8, 8)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(count)), t, x).prev_sample
    return x


def main() -> None:
    """Train, sample eight digits, and print them as text."""
    torch.set_num_threads(1)  # Faster for products of small matrices.
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    samples = generate(train(images, scheduler), scheduler, 8)
    nearest = torch.cdist(samples.flatten(1), images.flatten(1)).amin(1).mean()
    print(f"distance to the nearest training image, mean of {len(samples)}: {float(nearest):.2f}\n")
    for rows in samples[:, 0].transpose(0, 1):
        print("  ".join("".join(" .:*#"[int((4.99 * (v + 1) / 2).clamp(0, 4))] for v in row) for row in rows))


if __name__ == "__main__":
    main()
