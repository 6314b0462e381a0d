"""Networks, weights from elsewhere, and which stages learn: against MONAI's own networks and rates computed by hand."""

import copy
import logging
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import boto3
import pytest
import torch
from monai.networks import nets
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import load
from cv_factory_ops.config.models import DenseNet, EfficientNet, Model, ResNet, SmallCnn, Vit
from cv_factory_ops.config.preprocessing import PreprocessingConfig
from cv_factory_ops.config.training import FineTuning
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.models import Classifier, build, freeze, parameter_groups, stages
from cv_factory_ops.pretrained import load_weights
from tests.bundles import write_bundle

SIZE = 32
MODELS: dict[str, Model] = {
    "small_cnn": SmallCnn(width=4),
    "resnet": ResNet(depth=10, small_input=False),
    "densenet": DenseNet(),
    "efficientnet": EfficientNet(),
    "vit": Vit(patch=8, width=16, layers=3, heads=2),
}
PRETRAINED = sorted(MODELS.keys() - {"small_cnn"})
"""Kinds that MONAI has."""
FROZEN = {
    "small_cnn": (1, ("0.", "1.", "3.", "4.")),
    "resnet": (2, ("conv1.", "bn1.", "layer1.")),
    "densenet": (2, ("features.conv0.", "features.norm0.", "features.denseblock1.", "features.transition1.")),
    "efficientnet": (3, ("_conv_stem.", "_bn0.", "_blocks.0.", "_blocks.1.")),
    "vit": (2, ("patch_embedding.", "cls_token", "blocks.0.")),
}
"""A number of first stages of each kind, and what the names of their weights begin with."""


def network_of(kind: str, classes: int = 3, channels: int = 1, **moments: float) -> Classifier:
    return build(MODELS[kind], classes, channels=channels, size=SIZE, **moments)


def images(count: int = 4, channels: int = 1, seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def monai(kind: str, channels: int = 1, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """A network of MONAI of five classes that has seen a few images, so that its statistics are its own, and its last layer."""
    torch.manual_seed(1)
    match kind:
        case "resnet":
            network = nets.resnet10(spatial_dims=2, n_input_channels=channels, num_classes=5, conv1_t_stride=2, **changes)
            last = network.fc
        case "densenet":
            network = nets.DenseNet121(spatial_dims=2, in_channels=channels, out_channels=5)
            last = network.class_layers.out
        case "efficientnet":
            network = nets.EfficientNetBN("efficientnet-b0", pretrained=False, in_channels=channels, num_classes=5)
            last = network._fc
        case _:
            sizes = {"img_size": SIZE, "patch_size": 8, "hidden_size": 16, "mlp_dim": 64, "num_layers": 3, "num_heads": 2}
            network = nets.ViT(
                channels, classification=True, num_classes=5, spatial_dims=2, post_activation="", **sizes | changes
            )
            last = network.classification_head
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a mean of all that was seen
    with torch.no_grad():
        network(images(8, channels, seed=2, size=changes.get("img_size", SIZE)))
    return network.eval(), last


@torch.no_grad()
def features_of(network: nn.Module, last: nn.Module, given: Tensor) -> Tensor:
    """What reaches a network's last layer."""
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(given)
    hook.remove()
    return seen[0]


def save(network: nn.Module, path: Path, rename: Callable[[str], str] = str) -> str:
    save_file({rename(name): tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return str(path)


def close(left: Tensor, right: Tensor) -> bool:
    """Equal but for rounding, which deep networks make more of."""
    return bool((left - right).abs().max() <= 1e-4 * right.abs().max())


def test_every_kind_is_tested_here() -> None:
    kinds = {model.model_fields["kind"].default for model in get_args(get_args(Model)[0])}
    assert set(MODELS) == kinds - {"unet", "retinanet"}  # tests/test_segmentation.py and tests/test_detection.py have those


@pytest.mark.parametrize("kind", MODELS)
def test_a_network_gives_logits_of_its_embedding_and_all_its_weights_learn(kind: str) -> None:
    network = network_of(kind, mean=0.5, std=0.25)
    logits, embedding = network(images())
    assert (logits.shape, embedding.shape) == ((4, 3), (4, network.features))
    functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()] == []
    network.eval()
    logits, embedding = network(images())
    assert torch.equal(network.head(embedding), logits)
    assert torch.equal(embedding, network.backbone((images() - 0.5) / 0.25))


@pytest.mark.parametrize("model", [*(EfficientNet(variant=v) for v in ("b1", "b2", "b3", "b4")), DenseNet(depth=169)], ids=str)
def test_each_variant_answers_at_its_smallest_size(model: Model) -> None:
    with torch.inference_mode():
        assert build(model, 2).eval()(torch.rand(1, 1, model.least_size, model.least_size))[0].shape == (1, 2)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_bundle_gives_the_same_network_back(home: Path, kind: str, channels: int) -> None:
    other = write_bundle(home / "other", 0)
    changes = {"model": MODELS[kind], "preprocessing": PreprocessingConfig(size=SIZE)}
    decoding = other.manifest.decoding.model_copy(update={"color": "rgb" if channels == 3 else "grey"})
    manifest = other.manifest.model_copy(update=changes | {"decoding": decoding})
    network = network_of(kind, classes=2, channels=channels, mean=0.5, std=0.25).eval()
    written = Bundle.write(home / "bundle", manifest, network, other.pca(), other.reference())
    with torch.inference_mode():
        assert torch.equal(
            Bundle.load(written.path).network()(images(channels=channels))[0], network(images(channels=channels))[0]
        )


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("small_cnn", ["backbone.0.weight", "backbone.18.running_var", "head.1.bias"]),
        ("resnet", ["backbone.conv1.weight", "backbone.layer4.0.downsample.0.weight", "head.bias"]),
        ("densenet", ["backbone.features.denseblock4.denselayer16.layers.conv2.weight", "head.weight"]),
        ("efficientnet", ["backbone._blocks.3.7._bn0.running_mean", "backbone._conv_head.weight", "head.1.weight"]),
        ("vit", ["backbone.cls_token", "backbone.blocks.2.attn.qkv.weight", "backbone.norm.weight", "head.weight"]),
    ],
)
def test_weights_keep_their_names(kind: str, names: list[str]) -> None:
    assert set(names) <= set(network_of(kind).state_dict())


@pytest.mark.parametrize(
    ("model", "size", "said"),
    [
        ({"kind": "vit", "patch": 16}, 40, r"preprocessing\.size 40: a multiple of model\.patch 16"),
        ({"kind": "densenet"}, 28, r"preprocessing\.size 28: at least 32 for model\.kind densenet"),
        ({"kind": "efficientnet"}, 31, r"preprocessing\.size 31: at least 32 for model\.kind efficientnet"),
        ({"kind": "efficientnet", "variant": "b9"}, 64, r"model\.efficientnet\.variant: 'b9' given; allowed: 'b0'"),
    ],
)
def test_a_size_that_does_not_suit_the_network_is_refused(
    project: Callable[..., Path], model: dict[str, object], size: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load(project(model=model, preprocessing={"size": size}))


@pytest.mark.parametrize("kind", PRETRAINED)
def test_with_weights_of_monai_the_backbone_is_monais_own_network(home: Path, kind: str) -> None:
    reference, last = monai(kind)
    network = network_of(kind, classes=5).eval()
    report = load_weights(network, save(reference, home / "weights.safetensors"))
    assert report.head
    logits, embedding = network(images())
    assert close(embedding, features_of(reference, last, images()))
    assert embedding.std(0).mean() > 1e-2  # it tells images apart
    expected = reference(images())
    assert close(logits, expected[0] if isinstance(expected, tuple) else expected)


def formerly(name: str) -> str:
    return re.sub(r"\.layers\.(norm|conv)(\d)", r".\1.\2", name)


@pytest.mark.parametrize(
    ("kind", "changes", "rename"),
    [
        ("resnet", {"bias_downsample": False}, str),
        ("densenet", {}, lambda name: name.replace(".layers.", ".").replace("class_layers.out", "classifier")),
        ("densenet", {}, formerly),
        ("efficientnet", {}, lambda name: re.sub(r"_blocks\.\d+\.", "_blocks.", name)),
    ],
)
def test_names_of_others_are_understood(home: Path, kind: str, changes: dict[str, Any], rename: Callable[[str], str]) -> None:
    reference, last = monai(kind, **changes)
    network = network_of(kind, classes=5).eval()
    assert load_weights(network, save(reference, home / "weights.safetensors", rename)).head
    assert close(network.embed(images()), features_of(reference, last, images()))


@pytest.mark.parametrize("kind", PRETRAINED)
@pytest.mark.parametrize(("theirs", "ours"), [(3, 1), (1, 3)])
def test_another_number_of_channels_answers_grey_images_alike(home: Path, kind: str, theirs: int, ours: int) -> None:
    reference, last = monai(kind, channels=theirs)
    network = network_of(kind, channels=ours).eval()
    load_weights(network, save(reference, home / "weights.safetensors"))
    expected = features_of(reference, last, images().expand(-1, theirs, -1, -1))
    assert close(network.embed(images().expand(-1, ours, -1, -1)), expected)


def test_a_head_of_other_classes_stays_new_and_the_log_says_so(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cvf")
    network = network_of("resnet", classes=2)
    before = copy.deepcopy(network.head.state_dict())
    path = save(monai("resnet")[0], home / "weights.safetensors")
    assert not load_weights(network, path).head
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.head.state_dict().items())
    assert caplog.messages == [f"the network begins with file://{path}: the backbone; the head is new"]


def test_the_weights_of_a_bundle_are_taken_but_for_its_mean(home: Path) -> None:
    bundle = write_bundle(home / "bundle", 5)
    network = build(SmallCnn(width=4), 2, mean=0.1, std=0.7)
    report = load_weights(network, "bundle/model.safetensors")
    assert report.head
    ours, theirs = network.state_dict(), bundle.network().state_dict()
    assert (float(ours.pop("mean")), float(ours.pop("std"))) == pytest.approx((0.1, 0.7))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_weights_come_from_s3(home: Path, bucket: str) -> None:
    reference, last = monai("vit")
    boto3.client("s3").upload_file(save(reference, home / "vit.safetensors"), bucket, "nets/vit.safetensors")
    (home / "vit.safetensors").unlink()
    network = network_of("vit").eval()
    load_weights(network, f"s3://{bucket}/nets/vit.safetensors")
    assert close(network.embed(images()), features_of(reference, last, images()))
    with pytest.raises(DataError, match=f"s3://{bucket}/none: is not there"):
        load_weights(network, f"s3://{bucket}/none")


def test_weights_of_half_precision_are_taken(home: Path) -> None:
    reference = monai("vit")[0].bfloat16()
    network = network_of("vit")
    load_weights(network, save(reference, home / "half.safetensors"))
    kept = network.get_parameter("backbone.blocks.0.attn.qkv.weight")
    assert kept.dtype == torch.float32
    assert torch.equal(kept, reference.get_parameter("blocks.0.attn.qkv.weight").float())


def plane(side: int) -> Tensor:
    """(side, side), linear in the place within the image"""
    places = (torch.arange(side) + 0.5) / side
    return places[:, None] + 2 * places


def test_positions_of_another_image_size_are_interpolated(home: Path) -> None:
    """A plane stays the same plane away from the border, whatever the grid: bicubic interpolation keeps straight lines."""
    reference = monai("vit", img_size=4 * SIZE)[0]
    reference.patch_embedding.position_embeddings.data = plane(16).reshape(1, 256, 1).repeat(1, 1, 16)
    path = save(reference, home / "weights.safetensors")
    for side in (8, 32):
        network = build(MODELS["vit"], 3, size=8 * side)
        load_weights(network, path)
        found = network.get_parameter("backbone.patch_embedding.position_embeddings").reshape(side, side, 16)
        inside = slice(3 * side // 8, 5 * side // 8)
        assert torch.allclose(found[inside, inside, 7], plane(side)[inside, inside], atol=1e-5), side


@pytest.mark.parametrize(
    ("depth", "small_input", "channels", "said"),
    [
        (10, True, 1, r"conv1\.weight is \(64, 1, 7, 7\) in the file, \(64, 1, 3, 3\) in the network"),
        (18, False, 1, r"layer1\.1\.conv1\.weight is not in the file"),
        (10, False, 2, r"conv1\.weight is \(64, 1, 7, 7\) in the file, \(64, 2, 7, 7\) in the network"),
    ],
)
def test_weights_of_another_network_change_nothing(home: Path, depth: Any, small_input: bool, channels: int, said: str) -> None:
    path = save(monai("resnet")[0], home / "weights.safetensors")
    network = build(ResNet(depth=depth, small_input=small_input), 5, channels=channels)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(DataError, match=said) as refused:
        load_weights(network, path)
    assert re.search(r"weights.safetensors: \d+ of the \d+ weights of this resnet are there and fit; ", str(refused.value))
    assert "allowed: a bundle's model.safetensors" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_deeper_network_is_not_cut_short(home: Path) -> None:
    deeper = nets.resnet18(spatial_dims=2, n_input_channels=1, num_classes=5, conv1_t_stride=2)
    with pytest.raises(DataError, match=r"(\d+) of the \1 weights .*: layer1\.1\.bn1\.bias is only in the file"):
        load_weights(network_of("resnet"), save(deeper, home / "weights.safetensors"))


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("none.safetensors", DataError, "none.safetensors: is not there"),
        ("bundle", DataError, "bundle: is not there"),
        ("text.safetensors", DataError, "text.safetensors: is not a safetensors file"),
        ("https://host/weights.safetensors", ConfigError, "scheme 'https' given"),
        ("hf://weights.safetensors", ConfigError, "allowed is hf://owner/repository/file"),
    ],
)
def test_what_is_no_file_of_weights_is_said(home: Path, place: str, error: type[Exception], said: str) -> None:
    write_bundle(home / "bundle", 0)
    (home / "text.safetensors").write_text("weights")
    with pytest.raises(error, match=said):
        load_weights(network_of("small_cnn"), place)


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub on this machine: what is put into the folder is served as ``owner/nets``."""
    from huggingface_hub import constants

    folder = home / "hub"
    folder.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            file = folder / self.path.removeprefix("/owner/nets/resolve/main/")
            self.send_response(200 if file.is_file() else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            if file.is_file():
                self.send_header("ETag", f'"{file.name}"')
                self.send_header("Content-Length", str(file.stat().st_size))
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write((folder / self.path.removeprefix("/owner/nets/resolve/main/")).read_bytes())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
        yield folder
        server.shutdown()


def test_weights_come_from_a_hub_and_then_from_its_cache(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    reference, last = monai("vit")
    save(reference, hub / "vit.safetensors")
    network = network_of("vit").eval()
    load_weights(network, "hf://owner/nets/vit.safetensors")
    assert close(network.embed(images()), features_of(reference, last, images()))
    with pytest.raises(ConfigError, match=r"hf://owner/nets/none.safetensors: the hub has no such file"):
        load_weights(network, "hf://owner/nets/none.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_weights(network_of("vit"), "hf://owner/nets/vit.safetensors")


def test_without_a_network_the_hub_is_one_line_that_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    page = "https://huggingface.co/owner/nets/blob/v2/small/vit.safetensors"
    with pytest.raises(Unavailable, match=f"without a network, give the path of a copy of {page}") as refused:
        load_weights(network_of("vit"), "hf://owner/nets@v2/small/vit.safetensors")
    assert "\n" not in str(refused.value)


def test_without_the_extra_its_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"needs huggingface_hub: pip install 'cv-factory\[hub\]'"):
        load_weights(network_of("vit"), "hf://owner/nets/vit.safetensors")


@pytest.mark.parametrize("kind", MODELS)
def test_stages_share_out_all_weights_from_the_input_to_the_head(kind: str) -> None:
    network = network_of(kind)
    weights = [weight for group in parameter_groups(network, 0.1, FineTuning(decay=0.9)) for weight in group["params"]]
    assert len(weights) == len({id(weight) for weight in weights})
    assert {id(weight) for weight in weights} == {id(weight) for weight in network.parameters()}
    order = {id(weight): i for i, weight in enumerate(network.parameters())}
    first = [order[id(group["params"][0])] for group in parameter_groups(network, 0.1, FineTuning(decay=0.9))]
    assert first == sorted(first)
    assert list(stages(network))[-1] == "head"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("probe", [False, True])
def test_frozen_stages_stay_as_they_are_and_all_others_learn(kind: str, probe: bool) -> None:
    network, (count, prefixes) = network_of(kind), FROZEN[kind]
    finetuning = FineTuning(probe=True) if probe else FineTuning(frozen=count, decay=0.8)
    freeze(network, finetuning)
    optimizer = torch.optim.AdamW(parameter_groups(network, 0.01, finetuning), weight_decay=0.1)
    before = copy.deepcopy(network.state_dict())
    for step in range(2):
        network.train()
        loss = functional.cross_entropy(network(images(8, seed=step))[0], torch.arange(8) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    frozen = ("backbone.",) if probe else tuple(f"backbone.{prefix}" for prefix in prefixes)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith((*frozen, "mean", "std"))}


def test_rates_fall_from_the_head_to_the_input() -> None:
    network = network_of("resnet")
    groups = parameter_groups(network, 0.08, FineTuning(frozen=1, decay=0.5))
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    found = {name: rates.get(id(weight)) for name, weight in network.named_parameters()}
    expected = {"backbone.conv1": None, "backbone.bn1": None, "head": 0.08}
    expected |= {f"backbone.layer{i}": rate for i, rate in {1: 0.005, 2: 0.01, 3: 0.02, 4: 0.04}.items()}
    assert {
        name: rate for name, rate in found.items() if rate != expected[next(p for p in expected if name.startswith(p))]
    } == {}


def test_one_rate_for_all_is_one_group() -> None:
    network = network_of("vit")
    groups = parameter_groups(network, 0.1, FineTuning())
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(len(list(network.parameters())), 0.1)]


def test_more_frozen_stages_than_there_are_is_refused() -> None:
    said = r"training\.objective\.frozen: 6 given; allowed: 0 to 5, .* resnet before its head: stem, layer1, .*, layer4"
    with pytest.raises(ConfigError, match=said):
        freeze(network_of("resnet"), FineTuning(frozen=6))


def test_a_copy_of_a_frozen_network_is_frozen_by_itself() -> None:
    network = network_of("resnet")
    freeze(network, FineTuning(frozen=1))
    twin = copy.deepcopy(network.eval())
    twin.train()
    assert (twin.backbone.get_submodule("bn1").training, twin.backbone.get_submodule("layer1").training) == (False, True)
    assert not network.backbone.get_submodule("layer1").training


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_ddp_finds_every_weight_in_use(kind: str, frozen: bool) -> None:
    """DDP refuses the second step where a weight that learns had no part in the first."""
    network = network_of(kind)
    if frozen:
        freeze(network, FineTuning(frozen=FROZEN[kind][0]))
    parallel = nn.parallel.DistributedDataParallel(network)
    for _ in range(2):
        loss = parallel(images())[0].square().mean()
        loss.backward()
    assert math.isfinite(float(loss.detach()))
