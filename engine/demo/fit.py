"""The training loop that the three stages share: resumable, reproducible, on any number of ranks.

Every random draw of a step comes from a generator seeded by (stage, step, rank), so a run that was
killed and resumed sees the same data and noise as one that was not. Ranks are processes that each
take their own batch and average their gradients; on a CPU two processes of one thread train faster
than one of two.
"""

import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Run:
    """Where a training run keeps its files, and which part of it this process is."""

    work: Path
    rank: int = 0
    ranks: int = 1
    fast: bool = False
    """a few steps of everything, to test that all of it runs"""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.rank) if torch.cuda.is_available() else torch.device("cpu")

    def barrier(self) -> None:
        if self.ranks > 1:
            dist.barrier()

    @contextmanager
    def bfloat16(self) -> Iterator[None]:
        """Autocast; weights and sums stay in fp32."""
        with torch.autocast(self.device.type, torch.bfloat16):
            yield


@dataclass(frozen=True)
class Stage:
    """What `fit` needs to know of a stage."""

    name: str
    steps: int
    lr: float
    decay: float = 0.3
    """share of the steps over which the learning rate falls to zero at the end"""
    averaging: float = 0.998
    """of the exponential moving average of the weights, which is what the stage hands on"""

    def lr_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / (0.02 * self.steps + 20))
        return self.lr * min(warm, (self.steps - step) / (self.decay * self.steps))


CHECKPOINT_STEPS = 100


def fit(
    stage: Stage,
    model: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    run: Run,
) -> None:
    """Train the parameters of `model` that require gradients, and leave their average in it.

    `loss(step, generator)` draws this rank's batch from the generator. A checkpoint is written
    every 100 steps; a finished stage is not trained again.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    optimizer = Muon(parameters, [p.ndim >= 2 and id(p) not in embeddings for p in parameters], run)
    average = [p.detach().clone() for p in parameters]
    path = run.work / f"{stage.name}.pt"
    first = _resume(path, parameters, average, optimizer)
    bar = tqdm(range(first, stage.steps), stage.name, stage.steps, initial=first, mininterval=5,
               disable=run.rank > 0)  # fmt: skip
    smooth = math.nan
    for step in bar:
        generator = torch.Generator()
        generator.manual_seed(zlib.crc32(f"{stage.name} {step} {run.rank}".encode()))
        value = loss(step, generator)
        value.backward()
        _average_gradients(parameters, run)
        optimizer.step(stage.lr_at(step))
        weight = min(stage.averaging, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - weight)
        smooth = value.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * value.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == stage.steps:
            _save(path, step + 1, parameters, average, optimizer, run)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)


def _average_gradients(parameters: Iterable[nn.Parameter], run: Run) -> None:
    """One all-reduce for all gradients: with small models the latency is what costs."""
    if run.ranks == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= run.ranks
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _save(
    path: Path, step: int, parameters: list[nn.Parameter], average: list[Tensor],
    optimizer: "Muon", run: Run,
) -> None:  # fmt: skip
    if run.rank == 0:
        state = {"step": step, "parameters": parameters, "average": average,
                 "optimizer": optimizer.state}  # fmt: skip
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)


def _resume(
    path: Path, parameters: list[nn.Parameter], average: list[Tensor], optimizer: "Muon"
) -> int:
    """Load what `_save` wrote, if anything; the step to go on from."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=parameters[0].device, weights_only=True)
    with torch.no_grad():
        for mine, saved in zip([*parameters, *average], [*state["parameters"], *state["average"]],
                               strict=True):  # fmt: skip
            mine.copy_(saved)
    optimizer.state = state["optimizer"]
    return int(state["step"])


class Muon:
    """Muon (Jordan et al. 2024) for matrices and kernels, Adam for all else, at one learning rate.

    Orthogonalised momentum reaches in some 1000 steps what Adam alone needs several times as many
    for; its updates are scaled to the size of Adam's (Moonlight, Liu et al. 2025).
    """

    def __init__(self, parameters: list[nn.Parameter], matrices: list[bool], run: Run) -> None:
        self.run = run
        self.parameters = parameters
        self.matrices = matrices
        self.state: dict[str, list[Tensor]] = {
            "momentum": [torch.zeros_like(p) for p in parameters],
            "variance": [
                p.new_zeros(()) if matrix else torch.zeros_like(p)
                for p, matrix in zip(parameters, matrices, strict=True)
            ],
            "steps": [torch.zeros(())],
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameters by their gradients, and clear those."""
        self.state["steps"][0] += 1
        self._step_matrices([i for i, matrix in enumerate(self.matrices) if matrix], lr)
        self._step_others([i for i, matrix in enumerate(self.matrices) if not matrix], lr)
        for parameter in self.parameters:
            parameter.grad = None

    def _step_matrices(self, numbers: list[int], lr: float) -> None:
        """Muon. The ranks share out the orthogonalising, which costs as much as a small batch."""
        parameters = [self.parameters[i] for i in numbers]
        flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        updates = flat.split([p.numel() for p in parameters])
        for turn, (i, parameter, update) in enumerate(
            zip(numbers, parameters, updates, strict=True)
        ):
            assert parameter.grad is not None
            momentum = self.state["momentum"][i].mul_(0.95).add_(parameter.grad)
            if turn % self.run.ranks == self.run.rank:
                direction = parameter.grad.add(momentum, alpha=0.95).flatten(1)
                update.copy_(_orthogonal(direction).flatten())
        if self.run.ranks > 1:
            dist.all_reduce(flat)
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - 0.01 * lr).add_(update.view_as(parameter), alpha=-lr)

    def _step_others(self, numbers: list[int], lr: float) -> None:
        """Adam."""
        steps = float(self.state["steps"][0])
        for i in numbers:
            parameter, gradient = self.parameters[i], self.parameters[i].grad
            assert gradient is not None
            momentum = self.state["momentum"][i].lerp_(gradient, 0.1)
            variance = self.state["variance"][i].lerp_(gradient.square(), 0.01)
            scale = (variance / (1 - 0.99**steps)).sqrt_().add_(1e-8)
            parameter.addcdiv_(momentum, scale, value=-lr / (1 - 0.9**steps))


def _orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrix, nearly, by Newton-Schulz, times 0.2 sqrt(longer side)."""
    wide = matrix.bfloat16()
    tall = wide.shape[0] > wide.shape[1]
    wide = wide.mT if tall else wide
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(iterations):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    wide = wide.mT if tall else wide
    return wide.to(matrix.dtype) * (0.2 * math.sqrt(max(matrix.shape)))
