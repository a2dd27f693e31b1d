"""The network's modules under client code, against `diffusers`: names, initial weights, hooks, patches, adapters."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel as DiffusersUNet2DModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddim.engine import get_engine
from ddim.unet import UNet2DModel
from helpers import randn, same_tensors

Model = UNet2DModel | DiffusersUNet2DModel

DOWN = {"D": "DownBlock2D", "A": "AttnDownBlock2D", "R": "ResnetDownsampleBlock2D"}
UP = {"D": "UpBlock2D", "A": "AttnUpBlock2D", "R": "ResnetUpsampleBlock2D"}
CLASSES: tuple[type[Any], type[Any]] = (UNet2DModel, DiffusersUNet2DModel)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Wide enough for the compiled kernels of training in channels_last.
BASE: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "block_out_channels": (16, 16, 32),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "resnet": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift", "down_block_types": ("A", "A", "R")},
    "padding-0": {"downsample_padding": 0, "layers_per_block": 2},
    "fourier": {"time_embedding_type": "fourier"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "classes": {"num_class_embeds": 5},
    "classes-timestep": {"class_embed_type": "timestep"},
    "classes-identity": {"class_embed_type": "identity"},
    "without-middle": {"mid_block_type": None},
    "middle-without-attention": {"add_attention": False},
    "act-gelu": {"act_fn": "gelu"},
}
every_config = pytest.mark.parametrize("name", CONFIGS)
every_format = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
every_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def build(cls: type[Any], **overrides: Any) -> Any:
    settings = {"down_block_types": ("D", "A", "R"), "up_block_types": ("R", "A", "D")} | BASE | overrides
    settings["down_block_types"] = tuple(DOWN[name] for name in settings["down_block_types"])
    settings["up_block_types"] = tuple(UP[name] for name in settings["up_block_types"])
    torch.manual_seed(0)
    return cls(**settings)


def labels(model: Any) -> dict[str, Tensor]:
    if model.class_embedding is None:
        return {}
    if model.config.class_embed_type == "identity":
        return {"class_labels": randn(2, model.time_embedding.linear_2.out_features, seed=2)}
    return {"class_labels": torch.tensor([4, 1])}


def run(model: Any, training: bool, layout: torch.memory_format) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradients of its mean square by name."""
    model.train(training).to(memory_format=layout)
    x = randn(2, 3, 8, 8, seed=1).contiguous(memory_format=layout)
    output = model(x, torch.tensor([3, 700]), **labels(model)).sample
    model.zero_grad()
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_results(ours: Any, theirs: Any, training: bool, layout: torch.memory_format) -> None:
    (output, gradients), (expected, expected_gradients) = (run(model, training, layout) for model in (ours, theirs))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * scale, name


@every_config
def test_modules_and_initial_weights(name: str) -> None:
    """Under one seed: what an optimizer's state, a list of averages or a hook refers to is the same."""
    ours, theirs = (build(cls, **CONFIGS[name]) for cls in CLASSES)
    modules = [[(key, type(module).__name__) for key, module in model.named_modules()] for model in (ours, theirs)]
    assert modules[0] == modules[1]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    parameters = [[(key, p.requires_grad) for key, p in model.named_parameters()] for model in (ours, theirs)]
    assert parameters[0] == parameters[1]
    assert same_tensors(ours.state_dict(), theirs.state_dict())


def test_construction_leaves_the_generator_where_diffusers_does() -> None:
    draws = []
    for cls in CLASSES:
        build(cls, time_embedding_type="fourier")
        draws.append(torch.rand(1))
    assert torch.equal(*draws)


def count_hooks(model: Any, training: bool, layout: torch.memory_format) -> tuple[Counter[str], dict[str, Any]]:
    """Return how often the hooks of each module run, and the shapes that its forward hook sees."""
    counts: Counter[str] = Counter()
    shapes: dict[str, Any] = {}

    def count(kind: str, name: str, *arguments: Any) -> None:
        counts[f"{kind} {name}"] += 1
        if kind == "forward":
            _, inputs, keywords, output = arguments
            tensors = [x for x in (*inputs, *keywords.values(), output) if isinstance(x, Tensor)]
            # Beside feature maps, time embeddings are left out: attention does not get them here.
            if tensors and tensors[0].ndim == 4:
                tensors = [x for x in tensors if x.ndim == 4]
            shapes[name] = [tuple(x.shape) for x in tensors]

    for name, module in model.named_modules():
        module.register_forward_hook(functools.partial(count, "forward", name), with_kwargs=True)
        module.register_forward_pre_hook(functools.partial(count, "pre", name))
        if name:
            module.register_full_backward_hook(functools.partial(count, "backward", name))
    run(model, training, layout)
    return counts, shapes


@pytest.mark.filterwarnings("ignore:Full backward hook")
@every_format
@every_mode
@every_config
def test_hooks_run_as_often(name: str, training: bool, layout: torch.memory_format) -> None:
    (counts, shapes), (expected, expected_shapes) = (
        count_hooks(build(cls, **CONFIGS[name]), training, layout) for cls in CLASSES
    )
    assert counts == expected
    assert min(counts.values()) > 0
    assert shapes == expected_shapes
    called = {key.split()[-1] for key in counts}
    model = build(UNet2DModel, **CONFIGS[name])
    lists = {key for key, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    assert {key for key, _ in model.named_modules() if key} - lists <= called


def test_hooks_run_with_an_engine() -> None:
    model, calls = build(UNet2DModel).eval(), Counter[str]()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    get_engine(model).predict(randn(1, 3, 8, 8), 5)
    assert calls["mid_block.resnets.0.conv1"] == 1
    assert calls["up_blocks.1.upsamplers.0.conv"] == 1


class Doubled(nn.Module):
    """A wrapper without a weight of its own."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.wrapped(x)


class LowRank(nn.Module):
    """LoRA of a convolution or linear layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        K = layer.weight.shape[0]
        if isinstance(layer, nn.Conv2d):
            size = {"stride": layer.stride, "padding": layer.padding}
            self.down: nn.Module = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, bias=False, **size)
            self.up: nn.Module = nn.Conv2d(2, K, 1, bias=False)
        else:
            self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def replace(model: Any, kinds: tuple[type[nn.Module], ...], make: Callable[[nn.Module], nn.Module]) -> None:
    """Replace all modules of some kinds."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kinds):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))


def make_seamless(model: Any) -> None:
    """Pad by the opposite side, as scripts for tiles do."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def hook(model: Any, kinds: tuple[type[nn.Module], ...]) -> None:
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda module, inputs, output: 1.5 * output)


def patch(model: Any, kinds: tuple[type[nn.Module], ...]) -> None:
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = lambda x, forward=module.forward: 1.5 * forward(x)


def subclass(model: Any, kind: Any) -> None:
    changed = type(f"Changed{kind.__name__}", (kind,), {"forward": lambda self, x: 1.5 * kind.forward(self, x)})
    for module in model.modules():
        if type(module) is kind:
            module.__class__ = changed


def parametrize_weights(model: Any) -> None:
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.GroupNorm | nn.Linear):
            parametrize.register_parametrization(module, "weight", Scaled())


def adapt(model: Any) -> None:
    torch.manual_seed(1)
    replace(model, (nn.Conv2d, nn.Linear), LowRank)


CHANGES: dict[str, Callable[[Any], None]] = {
    "hooked convolutions": lambda model: hook(model, (nn.Conv2d,)),
    "hooked norms": lambda model: hook(model, (nn.GroupNorm,)),
    "hooked activations": lambda model: hook(model, (nn.SiLU,)),
    "hooked dropout": lambda model: hook(model, (nn.Dropout,)),
    "patched convolutions": lambda model: patch(model, (nn.Conv2d,)),
    "patched norms": lambda model: patch(model, (nn.GroupNorm,)),
    "convolutions of a subclass": lambda model: subclass(model, nn.Conv2d),
    "norms of a subclass": lambda model: subclass(model, nn.GroupNorm),
    "activations of a subclass": lambda model: subclass(model, nn.SiLU),
    "circular padding": make_seamless,
    "parametrized": parametrize_weights,
    "wrapped": lambda model: replace(model, (nn.Conv2d, nn.GroupNorm, nn.SiLU, nn.Linear), Doubled),
    "sequential": lambda model: replace(model, (nn.Conv2d, nn.GroupNorm, nn.SiLU), nn.Sequential),
    "LoRA": adapt,
}


@every_format
@every_mode
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_modules_take_effect(
    change: Callable[[Any], None], training: bool, layout: torch.memory_format
) -> None:
    ours, theirs = (build(cls) for cls in CLASSES)
    before = run(ours, training, layout)[0]
    change(ours)
    change(theirs)
    assert_same_results(ours, theirs, training, layout)
    assert get_engine(ours).name == "UNet2DModel"
    assert ours.dtype == theirs.dtype
    assert ours.device == theirs.device
    if change is not CHANGES["sequential"]:
        assert (run(ours, training, layout)[0] - before).abs().max() > 1e-3


@contextmanager
def patched_class(kind: Any) -> Iterator[None]:
    original = kind.forward
    kind.forward = lambda self, x: 1.5 * original(self, x)
    try:
        yield
    finally:
        kind.forward = original


@every_format
@every_mode
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.GroupNorm, nn.SiLU])
def test_patched_classes_take_effect(kind: type[nn.Module], training: bool, layout: torch.memory_format) -> None:
    with patched_class(kind):
        ours, theirs = (build(cls) for cls in CLASSES)
        assert_same_results(ours, theirs, training, layout)
        assert get_engine(ours).name == "UNet2DModel"


@every_format
@every_mode
def test_peft(training: bool, layout: torch.memory_format) -> None:
    peft = pytest.importorskip("peft")
    models = []
    for cls in CLASSES:
        model = build(cls)
        targets = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        torch.manual_seed(1)
        models.append(
            peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
        )
    assert_same_results(*models, training, layout)
    adapters = {name: p for name, p in models[0].named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(targets)
    # The bias of the keys, and so a part of their adapters, changes no attention.
    assert all(p.grad.abs().max() > 0 for name, p in adapters.items() if "to_k" not in name)


def train(cls: type[Any], optimizer_state: Any = None, steps: int = 20, autocast: bool = False) -> tuple[Any, Any]:
    """Return a network and the optimizer that trained it."""
    model = build(cls, dropout=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    torch.manual_seed(5)
    for step in range(steps):
        x, noise = randn(4, 3, 8, 8, seed=2 * step), randn(4, 3, 8, 8, seed=2 * step + 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction = model(x + noise, torch.arange(4) * 250).sample
        optimizer.zero_grad()
        F.mse_loss(prediction.float(), noise).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_training_gives_the_same_weights(autocast: bool) -> None:
    (ours, _), (theirs, _) = (train(cls, autocast=autocast) for cls in CLASSES)
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=0, atol=1e-5, msg=name)


def test_optimizer_state_is_exchangeable() -> None:
    states = [train(cls, steps=2)[1].state_dict() for cls in CLASSES]
    (ours, _), (theirs, _) = (train(cls, state, steps=2) for cls, state in zip(CLASSES, reversed(states), strict=True))
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=0, atol=1e-5, msg=name)


class TestBlocks:
    """Blocks and layers called by themselves, with the keywords of `diffusers`."""

    @pytest.fixture(scope="class")
    def models(self) -> list[Any]:
        return [build(cls).eval() for cls in CLASSES]

    def assert_equal(self, models: list[Any], call: Callable[[Any], Any]) -> None:
        with torch.no_grad():
            ours, theirs = (call(model) for model in models)
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    def test_down_block(self, models: list[Any]) -> None:
        x, temb = randn(2, 16, 8, 8), randn(2, 64, seed=1)
        self.assert_equal(models, lambda model: model.down_blocks[1](hidden_states=x, temb=temb))

    def test_middle_block(self, models: list[Any]) -> None:
        x, temb = randn(2, 32, 4, 4), randn(2, 64, seed=1)
        self.assert_equal(models, lambda model: model.mid_block(x, temb))
        self.assert_equal(models, lambda model: model.mid_block(hidden_states=x, temb=temb))

    @pytest.mark.parametrize("index", [0, 1, 2])
    def test_up_block(self, models: list[Any], index: int) -> None:
        temb = randn(2, 64, seed=1)

        def call(model: Any) -> Tensor:
            block = model.up_blocks[index]
            channels = [resnet.norm1.num_channels for resnet in block.resnets]
            width = block.resnets[0].conv1.out_channels
            first = {0: 32, 1: 32, 2: 16}[index]
            skips = [count - (first if i == 0 else width) for i, count in enumerate(channels)]
            maps = tuple(randn(2, count, 4, 4, seed=i) for i, count in reversed(list(enumerate(skips))))
            x = randn(2, first, 4, 4, seed=9)
            return block(hidden_states=x, res_hidden_states_tuple=maps, temb=temb)

        self.assert_equal(models, call)

    def test_layers(self, models: list[Any]) -> None:
        x, temb = randn(2, 16, 8, 8), randn(2, 64, seed=1)
        self.assert_equal(models, lambda model: model.down_blocks[0].resnets[0](input_tensor=x, temb=temb))
        self.assert_equal(models, lambda model: model.down_blocks[0].downsamplers[0](hidden_states=x))
        self.assert_equal(models, lambda model: model.down_blocks[1].attentions[0](hidden_states=x))
        self.assert_equal(models, lambda model: model.up_blocks[1].upsamplers[0](hidden_states=x))
        self.assert_equal(models, lambda model: model.up_blocks[1].upsamplers[0](x, output_size=(15, 17)))
        self.assert_equal(models, lambda model: model.time_embedding(model.time_proj(torch.tensor([3, 7]))))

    def test_attributes(self, models: list[Any]) -> None:
        def kinds(model: Any) -> list[Any]:
            blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
            return [(type(block).__name__, hasattr(block, "attentions"), len(block.resnets)) for block in blocks]

        assert kinds(models[0]) == kinds(models[1])


class TestCheckpointing:
    @pytest.mark.filterwarnings("ignore:Full backward hook")
    def test_resnets_are_computed_as_often(self) -> None:
        counts = []
        for cls in CLASSES:
            model = build(cls).train()
            assert not model.is_gradient_checkpointing
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
            counts.append(count_hooks(model, True, torch.contiguous_format)[0])
            model.disable_gradient_checkpointing()
            assert not model.is_gradient_checkpointing
        assert counts[0] == counts[1]
        assert counts[0]["pre mid_block.resnets.1"] == 2

    def test_custom_function(self) -> None:
        calls: list[list[str]] = []
        for cls in CLASSES:
            model, names = build(cls).train(), []

            def call(module: nn.Module, *args: Any, names: list[str] = names) -> Any:
                names.append(type(module).__name__)
                return module(*args)

            model.enable_gradient_checkpointing(call)
            run(model, True, torch.contiguous_format)
            calls.append(names)
        assert calls[0] == calls[1]

    def test_one_block(self) -> None:
        model = build(UNet2DModel).train()
        expected = run(model, True, torch.contiguous_format)[1]
        model.down_blocks[0].gradient_checkpointing = True
        assert model.is_gradient_checkpointing
        assert same_tensors(run(model, True, torch.contiguous_format)[1], expected)


class TestCounts:
    @every_config
    def test_sizes(self, name: str) -> None:
        ours, theirs = (build(cls, **CONFIGS[name]) for cls in CLASSES)
        for only_trainable in (True, False):
            for exclude_embeddings in (True, False):
                expected = theirs.num_parameters(only_trainable, exclude_embeddings)
                assert ours.num_parameters(only_trainable, exclude_embeddings) == expected
        assert ours.get_memory_footprint() == theirs.get_memory_footprint()
        assert ours.get_memory_footprint(return_buffers=False) == theirs.get_memory_footprint(return_buffers=False)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(5, 16, 3, padding=1), lambda: Doubled(nn.Conv2d(5, 16, 1))])
def test_first_convolution_of_other_channels(make: Callable[[], nn.Module]) -> None:
    """As models that are conditioned on images are made, without any change of the configuration."""
    outputs = []
    for cls in CLASSES:
        model = build(cls).eval()
        torch.manual_seed(3)
        model.conv_in = make()
        outputs.append(model(randn(2, 5, 8, 8), 7).sample)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    if isinstance(model.conv_in, nn.Conv2d):
        ours = build(UNet2DModel)
        ours.conv_in = model.conv_in
        with pytest.raises(ValueError, match=r"expected shape \(N, 5, H, W\)"):
            ours(randn(2, 3, 8, 8), 7)


def test_hook_that_adds_channels() -> None:
    outputs = []
    for cls in CLASSES:
        model = build(cls).eval()
        torch.manual_seed(3)
        model.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        model.conv_in.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], args[0][:, :1]], 1),))
        outputs.append(model(randn(2, 3, 8, 8), 7).sample)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_replica_of_data_parallel() -> None:
    """`nn.DataParallel` makes modules whose weights are plain tensors, here by hand: it needs GPUs otherwise."""
    model = build(UNet2DModel).eval()
    expected = model(randn(2, 3, 8, 8), 7).sample
    copies: dict[int, Any] = {}
    for module in model.modules():
        copies[id(module)] = replica = module._replicate_for_data_parallel()
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, 1 * parameter)
    for module in model.modules():
        for name, child in module.named_children():
            copies[id(module)]._modules[name] = copies[id(child)]
    replica = copies[id(model)]
    assert not list(replica.parameters())
    assert (replica.dtype, replica.device) == (model.dtype, model.device)
    torch.testing.assert_close(replica(randn(2, 3, 8, 8), 7).sample, expected, rtol=0, atol=1e-5)
