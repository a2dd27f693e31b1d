"""Training scripts: loops, EMA, accelerate, checkpoints, LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from dropin.library import TINY, Library, Observed, client, make_pipeline, make_unet, sample
from helpers import rand, randn, seeded


def batches(count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return images, noise and timesteps of `count` batches."""
    generator = seeded(7)
    return [
        (
            torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1,
            torch.randn(4, 3, 8, 8, generator=generator),
            torch.randint(0, 1000, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def train(unet: Any, scheduler: Any, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, ...]]) -> list[float]:
    """Train in the manner of the training notebook and return the losses."""
    losses = []
    for images, noise, timesteps in data:
        prediction = unet(scheduler.add_noise(images, noise, timesteps), timesteps, return_dict=False)[0]
        loss = F.mse_loss(prediction, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights, without those whose gradient is nothing but rounding, which Adam makes full steps of.

    The bias of the keys adds the same score to all keys of a query, and softmax ignores it.
    """
    return {name: value.clone() for name, value in module.state_dict().items() if not name.endswith("to_k.bias")}


@client()
def weights_drawn_from_a_seed(lib: Library, folder: Path) -> Observed:
    unet = lib.UNet2DModel(**TINY | {"num_class_embeds": 3, "resnet_time_scale_shift": "scale_shift"})
    deep = lib.UNet2DModel(
        8,
        down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
    )
    return {"weights": dict(unet.named_parameters()), "deep": dict(deep.named_parameters()), "next": torch.rand(3)}


# Sums of float32 are rounded in another order, which 20 steps of Adam amplify.
@client(tolerance=3e-5)
def training_notebook(lib: Library, folder: Path) -> Observed:
    unet, scheduler = lib.UNet2DModel(**TINY), lib.DDIMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    rates = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=20)
    losses = []
    for batch in batches(20):
        losses += train(unet, scheduler, optimizer, [batch])
        rates.step()
    pipe = lib.DDIMPipeline(unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "run")
    again = lib.DDIMPipeline.from_pretrained(folder / "run")
    return {"losses": losses, "weights": weights(unet), "images": sample(pipe), "loaded": weights(again.unet)}


@client(tolerance=1e-9)
def training_in_float64(lib: Library, folder: Path) -> Observed:
    unet, scheduler = lib.UNet2DModel(**TINY).double(), lib.DDIMScheduler(prediction_type="v_prediction")
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1, momentum=0.9)
    for images, noise, timesteps in batches(20):
        x0, epsilon = images.double(), noise.double()
        # The schedule of diffusers is rounded to float32; a schedule that both compute exactly makes this comparable.
        alpha = (0.5 ** (timesteps.double() / 200)).view(-1, 1, 1, 1)
        prediction = unet(alpha.sqrt() * x0 + (1 - alpha).sqrt() * epsilon, timesteps).sample
        F.mse_loss(prediction, alpha.sqrt() * epsilon - (1 - alpha).sqrt() * x0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": dict(unet.state_dict()), "prediction_type": scheduler.config.prediction_type}


@client()
def fine_tuning_of_a_few_layers(lib: Library, folder: Path) -> Observed:
    make_pipeline(lib, beta_schedule="scaled_linear").save_pretrained(folder)
    pipe = lib.DDIMPipeline.from_pretrained(folder)
    unet = pipe.unet
    unet.requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("attentions" in name or name.startswith("up_blocks.1.resnets"))
    unet.train()
    trainable = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.05)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    losses = train(unet, pipe.scheduler, optimizer, batches(5))
    changed = [name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])]
    return {"losses": losses, "trainable": trainable, "changed": changed, "weights": dict(unet.state_dict())}


@client()
def min_snr_weighting(lib: Library, folder: Path) -> Observed:
    unet, scheduler = make_unet(lib).train(), lib.DDIMScheduler(prediction_type="v_prediction")
    losses = []
    for images, noise, timesteps in batches(3):
        snr = compute_snr(scheduler, timesteps)
        weight = torch.stack([snr, 5 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / (snr + 1)
        prediction = unet(scheduler.add_noise(images, noise, timesteps), timesteps).sample
        target = scheduler.get_velocity(images, noise, timesteps)
        loss = (F.mse_loss(prediction, target, reduction="none").mean(dim=[1, 2, 3]) * weight).mean()
        loss.backward()
        losses.append(loss.item())
    return {"losses": losses, "gradient": unet.conv_in.weight.grad}


@client()
def dropout_from_a_seed(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib, dropout=0.3).train()
    torch.manual_seed(5)
    first = unet(randn(2, 3, 8, 8), torch.tensor([3, 500])).sample
    first.sum().backward()
    return {
        "output": first,
        "gradient": unet.conv_in.weight.grad,
        "evaluated": unet.eval()(randn(2, 3, 8, 8), 3).sample,
    }


@client()
def gradient_checkpointing(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib).train()
    states = [unet.is_gradient_checkpointing]
    unet.enable_gradient_checkpointing()
    states.append(unet.is_gradient_checkpointing)
    loss = unet(randn(2, 3, 8, 8), torch.tensor([3, 500])).sample.square().mean()
    loss.backward()
    unet.disable_gradient_checkpointing()
    states.append(unet.is_gradient_checkpointing)
    gradients = {n: p.grad.clone() for n, p in unet.named_parameters()}
    x = randn(2, 3, 8, 8).requires_grad_()
    checkpoint(unet, x, torch.tensor([3, 500]), use_reentrant=False).sample.square().mean().backward()
    return {"states": states, "loss": loss, "gradients": gradients, "by PyTorch": x.grad}


@client()
def ema_saved_and_resumed(lib: Library, folder: Path) -> Observed:
    unet, scheduler = make_unet(lib).train(), lib.DDIMScheduler()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.05)
    ema = EMAModel(
        unet.parameters(), decay=0.9, use_ema_warmup=True, model_cls=lib.UNet2DModel, model_config=unet.config
    )
    for batch in batches(4):
        train(unet, scheduler, optimizer, [batch])
        ema.step(unet.parameters())
    ema.save_pretrained(folder / "unet_ema")
    resumed = EMAModel.from_pretrained(folder / "unet_ema", model_cls=lib.UNet2DModel)
    settings = {name: value for name, value in resumed.state_dict().items() if name != "shadow_params"}
    resumed.store(unet.parameters())
    resumed.copy_to(unet.parameters())
    averaged = unet.eval()(randn(2, 3, 8, 8), 10).sample
    resumed.restore(unet.parameters())
    loaded = lib.UNet2DModel.from_pretrained(folder / "unet_ema")
    return {
        "shadow": ema.shadow_params,
        "resumed": resumed.shadow_params,
        "settings": settings,
        "averaged": averaged,
        "restored": unet(randn(2, 3, 8, 8), 10).sample,
        "config": {
            name: loaded.config[name] for name in ("decay", "optimization_step", "use_ema_warmup", "sample_size")
        },
    }


@client()
def ema_of_a_diffusers_run_taken_over(lib: Library, folder: Path) -> Observed:
    theirs = diffusers.UNet2DModel(**TINY)
    ema = EMAModel(theirs.parameters(), model_cls=diffusers.UNet2DModel, model_config=theirs.config)
    ema.save_pretrained(folder / "ema")
    unet = lib.UNet2DModel(**TINY)
    resumed = EMAModel.from_pretrained(folder / "ema", model_cls=lib.UNet2DModel)
    by_position = EMAModel(unet.parameters())
    by_position.load_state_dict(ema.state_dict())
    by_position.copy_to(unet.parameters())
    return {"weights": dict(unet.state_dict()), "resumed": resumed.shadow_params}


@client()
def optimizer_of_a_diffusers_run_taken_over(lib: Library, folder: Path) -> Observed:
    torch.manual_seed(3)
    theirs, scheduler = diffusers.UNet2DModel(**TINY), diffusers.DDIMScheduler()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9)
    train(theirs, scheduler, optimizer, batches(4))
    theirs.save_pretrained(folder / "checkpoint")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")

    unet = lib.UNet2DModel.from_pretrained(folder / "checkpoint").train()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(torch.load(folder / "optimizer.bin"))
    shapes = [tuple(state["momentum_buffer"].shape) for state in optimizer.state.values()]
    losses = train(unet, lib.DDIMScheduler(), optimizer, batches(8)[4:])
    return {"shapes": shapes, "losses": losses, "weights": dict(unet.state_dict())}


def accelerated(lib: Library, folder: Path, precision: str) -> Observed:
    """Train with accelerate, save the state, load it again, and unwrap."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=True, gradient_accumulation_steps=2)
    unet, scheduler = make_unet(lib).train(), lib.DDIMScheduler()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.05)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    losses, dtypes = [], set()
    for images, noise, timesteps in batches(4):
        with accelerator.accumulate(unet):
            output = unet(scheduler.add_noise(images, noise, timesteps), timesteps)
            dtypes.add(str(output.sample.dtype))
            loss = F.mse_loss(output.sample, noise)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.save_state(str(folder / "state"))
    trained = {name: value.clone() for name, value in accelerator.unwrap_model(unet).state_dict().items()}
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    accelerator.load_state(str(folder / "state"))
    unwrapped = accelerator.unwrap_model(unet)
    same = all(torch.equal(value, trained[name]) for name, value in unwrapped.state_dict().items())
    pipe = lib.DDIMPipeline(unet=accelerator.unwrap_model(unet, keep_fp32_wrapper=False), scheduler=scheduler)
    pipe.save_pretrained(folder / "pipeline")
    AcceleratorState._reset_state(reset_partial_state=True)
    return {
        "losses": losses,
        "dtypes": sorted(dtypes),
        "is the class": type(unwrapped) is lib.UNet2DModel,
        "same after loading": same,
        "weights": trained,
        "files": [path.name for path in sorted((folder / "pipeline" / "unet").iterdir())],
    }


@client()
def accelerate_in_float32(lib: Library, folder: Path) -> Observed:
    return accelerated(lib, folder, "no")


# Autocast rounds to 8 bits, and the operators that it rounds are not the same.
@client(tolerance=1e-2)
def accelerate_in_bfloat16(lib: Library, folder: Path) -> Observed:
    return accelerated(lib, folder, "bf16")


@client()
def hooks_of_the_training_example(lib: Library, folder: Path) -> Observed:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    unet, scheduler = make_unet(lib).train(), lib.DDIMScheduler()
    ema = EMAModel(unet.parameters(), decay=0.9, model_cls=lib.UNet2DModel, model_config=unet.config)

    def save(models: list[Any], weights: list[Any], output: str) -> None:
        ema.save_pretrained(str(Path(output) / "unet_ema"))
        for model in models:
            model.save_pretrained(str(Path(output) / "unet"))
            weights.pop()

    def load(models: list[Any], source: str) -> None:
        ema.load_state_dict(EMAModel.from_pretrained(str(Path(source) / "unet_ema"), lib.UNet2DModel).state_dict())
        while models:
            model = models.pop()
            stored = lib.UNet2DModel.from_pretrained(source, subfolder="unet")
            model.register_to_config(**stored.config)
            model.load_state_dict(stored.state_dict())

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.05, momentum=0.9)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    losses = []
    for step, batch in enumerate(batches(6)):
        if step == 3:
            accelerator.save_state(str(folder / "checkpoint"))
        losses += train(unet, scheduler, optimizer, [batch])
        ema.step(unet.parameters())
    accelerator.load_state(str(folder / "checkpoint"))
    again = train(unet, scheduler, optimizer, batches(6)[3:])
    AcceleratorState._reset_state(reset_partial_state=True)
    return {
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")),
        "losses": losses,
        "again": again,
        "ema": ema.optimization_step,
        "shadow": ema.shadow_params,
    }


@client()
def distributed_data_parallel(lib: Library, folder: Path) -> Observed:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        unet = DistributedDataParallel(make_unet(lib).train(), static_graph=True)
        optimizer = torch.optim.SGD(unet.parameters(), lr=0.05)
        losses = train(unet, lib.DDIMScheduler(), optimizer, batches(2))
        output = unet(randn(2, 3, 8, 8), torch.tensor([3, 500]))
    finally:
        torch.distributed.destroy_process_group()
    return {"losses": losses, "output": output.sample, "channels": unet.module.config.in_channels}


class LoraLayer(nn.Module):
    """A layer with a low-rank addition, as scripts inject it without a library: no attribute of the layer shows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        if isinstance(layer, nn.Linear):
            self.down: nn.Module = nn.Linear(layer.in_features, 2, bias=False)
            self.up: nn.Module = nn.Linear(2, layer.out_features, bias=False)
        else:
            assert isinstance(layer, nn.Conv2d)
            size, stride, padding = layer.kernel_size, layer.stride, layer.padding
            self.down = nn.Conv2d(layer.in_channels, 2, size, stride, padding, bias=False)
            self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@client()
def lora_injected_by_hand(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib, layers_per_block=2).requires_grad_(False)
    x, t = randn(2, 3, 8, 8), torch.tensor([3, 500])
    before = unet(x, t).sample
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for index, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        layer = LoraLayer(unet.get_submodule(name))
        for position, matrix in enumerate((layer.down, layer.up)):
            matrix.weight.data = 0.1 * randn(*matrix.weight.shape, seed=2 * index + position)
        setattr(unet.get_submodule(parent), child, layer)
    gradients = {}
    for mode in (True, False):
        unet.train(mode)
        unet.zero_grad()
        after = unet(x, t).sample
        after.square().mean().backward()
        gradients[mode] = {n: p.grad.clone() for n, p in unet.named_parameters() if p.requires_grad}
    reached = all(bool(gradient.any()) for gradient in gradients[True].values())
    with torch.no_grad():
        evaluated = unet(x, t).sample
    return {
        "layers": names,
        "before": before,
        "after": after,
        "evaluated": evaluated,
        "gradients": gradients,
        "reached": reached,
        "images": sample(make_pipeline(lib, unet)),
    }


@client()
def lora_by_peft(lib: Library, folder: Path) -> Observed:
    peft = pytest.importorskip("peft")
    unet = make_unet(lib)
    kinds = ("to_q", "to_k", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        init_lora_weights=False,
        target_modules=[*kinds, "linear_1", "linear_2", "time_emb_proj"],
    )
    adapted = peft.get_peft_model(unet, config)
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for index, parameter in enumerate(parameters.values()):
        parameter.data = 0.1 * randn(*parameter.shape, seed=index)
    x, t = randn(2, 3, 8, 8), torch.tensor([3, 500])
    output = adapted(x, t).sample
    output.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    with torch.no_grad():
        evaluated = adapted(x, t).sample
        with adapted.disable_adapter():
            disabled = adapted(x, t).sample
    merged = adapted.merge_and_unload()
    return {
        "names": list(parameters),
        "output": output,
        "gradients": gradients,
        "reached": all(bool(gradient.any()) for gradient in gradients.values()),
        "evaluated": evaluated,
        "disabled": disabled,
        "merged": merged(x, t).sample,
        "is the class": type(merged) is lib.UNet2DModel,
    }


@client()
def weight_norm_on_every_convolution(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    for module in list(unet.modules()):
        if isinstance(module, nn.Conv2d):
            parametrizations.weight_norm(module)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        unet.train().to(memory_format=memory_format)
        output = unet(randn(2, 3, 8, 8).to(memory_format=memory_format), torch.tensor([3, 500])).sample
        output.square().mean().backward()
    gradients = {name: p.grad for name, p in unet.named_parameters()}
    with torch.no_grad():
        evaluated = unet.eval()(randn(2, 3, 8, 8), torch.tensor([3, 500])).sample
    return {"output": output, "gradients": gradients, "evaluated": evaluated}


@client()
def distillation_of_a_copied_teacher(lib: Library, folder: Path) -> Observed:
    teacher = make_unet(lib)
    student = copy.deepcopy(teacher).train()
    teacher.requires_grad_(False)
    scheduler = lib.DDIMScheduler(clip_sample=False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    losses = []
    for images, noise, timesteps in batches(3):
        x = scheduler.add_noise(images, noise, timesteps)
        alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        with torch.no_grad():
            target = (x - (1 - alpha).sqrt() * teacher(x, timesteps).sample) / alpha.sqrt()
        loss = (alpha * (target - (x - (1 - alpha).sqrt() * student(x, timesteps).sample) / alpha.sqrt()) ** 2).mean()
        loss = loss + 0.01 * student.conv_in.weight.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "teacher": dict(teacher.state_dict()), "student": dict(student.state_dict())}


@client()
def input_convolution_replaced(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    wider = nn.Conv2d(6, unet.conv_in.out_channels, unet.conv_in.kernel_size, unet.conv_in.stride, unet.conv_in.padding)
    with torch.no_grad():
        wider.weight.zero_()
        wider.bias.copy_(unet.conv_in.bias)
        wider.weight[:, :3].copy_(unet.conv_in.weight)
    unet.conv_in = wider
    unet.register_to_config(in_channels=6)
    unet.train()
    output = unet(torch.cat([rand(2, 3, 8, 8), randn(2, 3, 8, 8)], 1), torch.tensor([3, 500])).sample
    output.square().mean().backward()
    unet.save_pretrained(folder / "unet")
    loaded = lib.UNet2DModel.from_pretrained(folder / "unet")
    return {
        "output": output,
        "gradient": wider.weight.grad,
        "config": [unet.config.in_channels, unet.config["in_channels"], loaded.config.in_channels],
        "loaded": loaded(torch.cat([rand(2, 3, 8, 8), randn(2, 3, 8, 8)], 1), 7).sample,
    }
