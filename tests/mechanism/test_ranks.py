"""Several processes are seen before they talk to each other."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpengine import Capture, DPOptimizer, PrivacyEngine, PrivacyError, finetune
from dpengine.mechanism.ranks import refuse_several

LAUNCHERS = {
    "torchrun": {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "4"},
    "Intel MPI": {"PMI_SIZE": "2"},
    "MVAPICH": {"MV2_COMM_WORLD_SIZE": "2"},
    # What accelerate leaves when it starts one process in place of two.
    "accelerate": {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"},
}


@pytest.fixture(params=LAUNCHERS)
def launched(request, monkeypatch):
    for name, value in LAUNCHERS[request.param].items():
        monkeypatch.setenv(name, value)


def test_each_launcher_is_refused(launched):
    with pytest.raises(ValueError, match="one process"):
        refuse_several()


def test_the_command_refuses_before_anything_is_made(launched, arguments, run, capsys):
    assert finetune.main(arguments) == 2
    assert "one process" in capsys.readouterr().err
    assert not run.path.exists()


def test_the_drop_in_refuses(launched):
    model = nn.Linear(2, 1)
    data = torch.utils.data.TensorDataset(torch.zeros(8, 2))
    with pytest.raises(ValueError, match="one process"):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(data, batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
        {"WORLD_SIZE": ""},
        {"ACCELERATE_USE_CPU": "True"},
        {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"},
        {"MASTER_ADDR": "cluster"},
    ],
)
def test_one_process_is_not_refused(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refuse_several()


@pytest.mark.slow
def test_accelerate_launch_on_a_cpu_is_refused(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    done = subprocess.run(
        [*launch, "-m", "dpengine.finetune", "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)},
    )
    assert "error: private training runs in one process" in done.stderr
    assert not (tmp_path / "run").exists()


def in_a_fork(call) -> str:
    """The name of the error that a forked child ended with; empty where there was none."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            call()
            answer = ""
        except BaseException as error:
            answer = type(error).__name__
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as answered:
        return answered.read()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("with_engine", [True, False])
def test_a_fork_does_not_train_on_weights_that_its_parent_has(with_engine):
    module = nn.Linear(3, 2).train()
    module.share_memory()
    inner, data = torch.optim.SGD(module.parameters(), lr=1.0), torch.randn(8, 3)
    if with_engine:
        _, optimizer, loader = PrivacyEngine().make_private(
            module=module,
            optimizer=inner,
            data_loader=DataLoader(TensorDataset(data), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        batches = (rows for (rows,) in loader)
    else:
        Capture(module)
        optimizer = DPOptimizer(
            inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8
        )
        batches = iter([data])

    def train() -> None:
        module(next(batches)).square().mean().backward()
        optimizer.step()

    before = module.weight.detach().clone()
    with torch.random.fork_rng():
        assert in_a_fork(train) == "PrivacyError"
    assert torch.equal(module.weight, before)


def test_a_sum_that_a_fork_inherits_is_not_noised_there(monkeypatch):
    module = nn.Linear(3, 2).train()
    optimizer = DPOptimizer(
        torch.optim.SGD(Capture(module).parameters, lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    module(torch.randn(8, 3)).square().mean().backward()
    optimizer.clip_and_accumulate()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "getpid", lambda: -1)
        with pytest.raises(PrivacyError, match="process's own"):
            optimizer.add_noise()
    optimizer.add_noise()
