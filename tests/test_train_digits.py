"""The main job as a newcomer runs it: the table, the picture, the devices, the errors."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.optimized

SCRIPT = Path(__file__).parents[1] / "notebooks" / "train_digits.py"
ROW = re.compile(r"(with BatchNorm|plain) +([\d.]+) +([\d.]+)% +(\d+|never)")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder, options):
    command = [sys.executable, SCRIPT, *options.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_prints_a_table_and_draws_a_picture(tmp_path):
    done = run(tmp_path, "--devices 2 --epochs 2 --learning-rates 1 0.1")
    assert done.returncode == 0, done.stderr
    assert "8/8" in done.stderr  # the progress bar counts the epochs of all runs
    sizes, head, *rows, picture = done.stdout.splitlines()
    assert sizes == "training digits: 1347, test digits: 450, devices: 2 x cpu"
    assert re.split("  +", head) == ["network", "learning rate", "test accuracy", "steps to 95%"]
    table = [ROW.fullmatch(row).groups() for row in rows]
    assert [row[:2] for row in table] == [
        ("with BatchNorm", "0.1"),
        ("with BatchNorm", "1"),
        ("plain", "0.1"),
        ("plain", "1"),
    ]
    accuracies = [float(row[2]) for row in table]
    assert accuracies[0] > 90
    assert accuracies[1] > 50
    assert accuracies[3] < 25  # the plain network at rate 1 stays near chance
    for _, _, accuracy, steps in table:
        assert steps == "never" if float(accuracy) < 95 else steps in ("21", "42")
    assert picture == "picture: results/train_digits.png"
    signature = (tmp_path / "results" / "train_digits.png").read_bytes()[:8]
    assert signature == b"\x89PNG\r\n\x1a\n"


def test_eight_devices_train_as_one_by_every_api(script, monkeypatch):
    (images, labels), test = script.load_data()
    data = (images[:448], labels[:448]), test
    shards = []

    def record_shards(*args, make=script.make_train_epoch):
        train_epoch = make(*args)

        def recording_epoch(state, batches, learning_rate):
            shards.append([(s.device, s.data.shape) for s in batches[0].addressable_shards])
            return train_epoch(state, batches, learning_rate)

        return recording_epoch

    def train(devices, api):
        return script.train(data, devices, [0.01], epochs=2, batch_size=64, seed=0, api=api)

    monkeypatch.setattr(script, "make_train_epoch", record_shards)
    monkeypatch.delitem(script.NETWORKS, "plain")  # needs nothing that the other does not need
    run = "with BatchNorm", 0.01
    one = train(jax.devices()[:1], "jit")
    assert shards == 2 * [[(jax.devices()[0], (7, 64, 8, 8, 1))]]
    assert list(one) == [run]
    losses, accuracies = one[run]
    assert losses.shape == (2, 7)
    for api in ("jit", "shard_map", "pmap"):
        shards.clear()
        eight = train(jax.devices(), api)
        assert list(eight) == [run]
        assert shards == 2 * [[(device, (7, 8, 8, 8, 1)) for device in jax.devices()]]
        np.testing.assert_allclose(eight[run][0], losses, rtol=1e-5, err_msg=api)
        one_digit = 1.5 / 450
        np.testing.assert_allclose(eight[run][1], accuracies, atol=one_digit, err_msg=api)


@pytest.mark.parametrize(
    ("options", "api"),
    [([], "jit"), *((["--api", api], api) for api in ("jit", "shard_map", "pmap"))],
)
def test_option_chooses_the_api(script, monkeypatch, tmp_path, options, api):
    asked = []

    def train(*args, api, **settings):
        asked.append(api)
        return {("plain", 0.5): (np.ones((1, 21)), np.ones(1))}

    monkeypatch.setattr(script, "train", train)
    script.main(["--out", str(tmp_path / "curves.png"), *options])
    assert asked == [api]


def test_split_is_stratified_and_fixed(script):
    (images, labels), (test_images, test_labels) = script.load_data()
    assert images.shape == (1347, 8, 8, 1)
    assert test_images.shape == (450, 8, 8, 1)
    assert (images.min(), images.max()) == (0, 1)
    share = np.bincount(test_labels) / np.bincount(np.concatenate([labels, test_labels]))
    np.testing.assert_allclose(share, 0.25, atol=0.005)
    np.testing.assert_array_equal(script.load_data()[1][1], test_labels)


def test_convolutions_before_batch_norm_have_no_bias(script):
    images = script.load_data()[0][0]
    for network, has_bias in (("with BatchNorm", False), ("plain", True)):
        params, stats, _ = script.init_state(script.NETWORKS[network], images, seed=0)
        convolutions = [p for name, p in params.items() if name.startswith("Conv")]
        assert len(convolutions) == 3
        assert all(("bias" in p) == has_bias for p in convolutions)
        assert bool(stats) != has_bias


def test_table_counts_the_steps_to_the_target(script, capsys):
    losses = np.ones((3, 21))
    script.print_table(
        {
            ("with BatchNorm", 0.5): (losses, np.array([0.4, 0.95, 0.94])),
            ("plain", 0.5): (losses * np.nan, np.array([0.3, 0.949, 0.1])),
        }
    )
    assert capsys.readouterr().out.splitlines()[1:] == [
        "with BatchNorm             0.5          94.0%            42",
        "plain                      0.5          10.0%         never",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 0", "argument --epochs: '0' is not a whole number from 1 to 1000"),
        ("--epochs=-3", "argument --epochs: '-3' is not a whole number from 1 to 1000"),
        ("--epochs 1.5", "argument --epochs: '1.5' is not a whole number from 1 to 1000"),
        (
            "--batch-size 0",
            "argument --batch-size: '0' is not a whole number from 1 to 1347, "
            "the number of training digits",
        ),
        (
            "--batch-size 1352",
            "argument --batch-size: '1352' is not a whole number from 1 to 1347, "
            "the number of training digits",
        ),
        (
            "--batch-size 60",
            "argument --batch-size: '60' is not a multiple of 8, the number of devices",
        ),
        ("--devices 0", "argument --devices: '0' is not a whole number from 1 to 64"),
        ("--devices 65", "argument --devices: '65' is not a whole number from 1 to 64"),
        ("--devices all", "argument --devices: 'all' is not a whole number from 1 to 64"),
        ("--seed=-1", "argument --seed: '-1' is not a whole number from 0 to 2147483647"),
        ("--learning-rates 0.1 0", "argument --learning-rates: '0' is not a positive number"),
        ("--learning-rates -0.1", "argument --learning-rates: '-0.1' is not a positive number"),
        ("--learning-rates nan", "argument --learning-rates: 'nan' is not a positive number"),
        ("--learning-rates inf", "argument --learning-rates: 'inf' is not a positive number"),
        ("--learning-rates fast", "argument --learning-rates: 'fast' is not a positive number"),
        ("--out curves.txt", "argument --out: 'curves.txt' does not end in .png or .pdf or .svg"),
        ("--out curves", "argument --out: 'curves' does not end in .png or .pdf or .svg"),
        ("--out file/a.png", "argument --out: 'file/a.png' cannot be written: File exists"),
        ("--out folder.png", "argument --out: 'folder.png' cannot be written: Is a directory"),
        ("--rate 1", "unrecognized arguments: --rate 1"),
    ],
)
def test_bad_option(script, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder.png").mkdir()
    with pytest.raises(SystemExit) as exit_:
        script.main(options.split())
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.err == f"usage: train_digits.py [options]\ntrain_digits.py: error: {message}\n"
    assert said.out == ""
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "file", tmp_path / "folder.png"]


def test_bad_api(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--api", "vmap"])
    said = capsys.readouterr().err.replace("'", "")  # Python 3.11 quotes the choices
    assert said == (
        "usage: train_digits.py [options]\ntrain_digits.py: error: "
        "argument --api: invalid choice: vmap (choose from jit, shard_map, pmap)\n"
    )


def test_bad_option_for_faked_devices(tmp_path):
    done = run(tmp_path, "--devices 7 --batch-size 64")
    assert done.returncode == 2
    assert done.stderr == (
        "usage: train_digits.py [options]\ntrain_digits.py: error: "
        "argument --batch-size: '64' is not a multiple of 7, the number of devices\n"
    )
