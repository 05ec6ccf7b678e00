"""Several training runs of small models side by side on one GPU, each step of each run one CUDA graph.

The recipe is `tsld-fx train`'s (AdamW without decay, linear fall of the rate, gradient norm 1, dropout as in the model,
ground-truth loss on the validation text at every evaluation, best weights kept); only the driver differs: a step of a
29 M-parameter model is a thousand small kernels, and launching them from Python takes ten times as long as they run.
On the CPU the same code runs step by step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from graphed_step import Models
from torch import Tensor

from tsld_fx import DistillConfig, PreparedModel, QuantConfig


class Score(Protocol):
    """A result on a validation set: mean loss (nats) of a token, and exp of it."""

    @property
    def loss(self) -> float: ...

    @property
    def perplexity(self) -> float: ...


@dataclass(frozen=True)
class Plan:
    """What one run does."""

    name: str
    quant: QuantConfig
    distill: DistillConfig
    seed: int = 0
    steps: int = 6000
    batch: int = 4
    rate: float = 3e-4
    evaluations: int = 6


@dataclass
class Result:
    """What came of it: perplexities, the curve as `metrics.jsonl` has it, and the best weights."""

    plan: Plan
    validation: float = math.inf
    best_step: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


class GraphedRun:
    """One run: `advance` does a step."""

    def __init__(self, plan: Plan, models: Models) -> None:
        torch.manual_seed(plan.seed)
        self.plan, blocks, device = plan, models.blocks, models.device
        self.models, self.loss = models, models.loss(plan.quant, plan.distill)
        self.named = models.student(plan.quant)
        self.parameters = [p for p in self.named.values() if p.requires_grad]
        learned = {id(self.named[name]) for name in models.learned(plan.quant)}
        groups = [
            ([p for p in self.parameters if id(p) not in learned], plan.rate),
            ([p for p in self.parameters if id(p) in learned], plan.rate * plan.quant.scale_lr_ratio),
        ]
        cuda = device.type == "cuda"
        options: dict[str, Any] = {"fused": True, "capturable": True} if cuda else {}
        self.optimizer = torch.optim.AdamW(
            [{"params": ps, "lr": torch.tensor(rate, device=device)} for ps, rate in groups if ps],
            weight_decay=0.0, **options,
        )  # fmt: skip
        self.peaks = [float(g["lr"]) for g in self.optimizer.param_groups]
        self.fall = 1 - torch.arange(plan.steps + 8, device=device) / plan.steps
        order = torch.Generator().manual_seed(plan.seed)
        epochs = -(-plan.steps * plan.batch // len(blocks)) + 1
        shuffled = torch.cat([torch.randperm(len(blocks), generator=order) for _ in range(epochs)])
        self.order = shuffled[: (plan.steps + 8) * plan.batch].view(-1, plan.batch).to(device)
        self.counter = torch.zeros(1, dtype=torch.long, device=device)
        self.log = torch.zeros(plan.steps + 8, 1 + len(plan.distill.terms()), device=device)
        self.done, self.result = 0, Result(plan)
        self.stream = torch.cuda.Stream() if cuda else None
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Record one step as a CUDA graph; a few steps run before it and are taken back."""
        assert self.stream is not None
        kept = [p.detach().clone() for p in self.parameters]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self._step()
        self.stream.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, kept)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self.counter.zero_()
        self.log.zero_()
        torch.cuda.synchronize()
        self.graph = graph

    def advance(self) -> None:
        """One step; on CUDA it is only queued."""
        if self.graph is None:
            self._step()
        else:
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        self.done += 1

    def _step(self) -> None:
        samples = self.order.index_select(0, self.counter).view(-1)
        fall = self.fall.index_select(0, self.counter).squeeze(0)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"].copy_(fall * peak)
        self.optimizer.zero_grad(set_to_none=True)
        with self.models.autocast(), self.models.checks():
            total, values = self.loss(self.named, samples)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        logged = torch.cat([total.detach().view(1), values.detach()])
        self.log.index_copy_(0, self.counter, logged.float().unsqueeze(0))
        self.counter += 1

    def write_log(self, first: int) -> None:
        """Move the mean losses of the steps since `first` into the metrics.

        Raises:
            FloatingPointError: a loss that is not finite.
        """
        chunk = self.log[first : self.done].double().mean(0).cpu()
        if not bool(torch.isfinite(chunk).all()):
            raise FloatingPointError(f"{self.plan.name}: the loss is not finite before step {self.done}")
        names = ["loss", *(f"loss_{t.kind}" for t in self.plan.distill.terms())]
        self.result.metrics.append(self._place() | dict(zip(names, chunk.tolist(), strict=True)))

    def evaluate(self, score: Callable[[PreparedModel], Score]) -> None:
        """Score the weights of now on the validation set; the best are kept."""
        found = score(self.models.with_weights(self.plan.quant, list(self.named.values())))
        self.result.metrics.append(self._place() | {"eval_loss": found.loss, "eval_perplexity": found.perplexity})
        if found.perplexity < self.result.validation:
            self.result.validation, self.result.best_step = found.perplexity, self.done
            self.result.weights = [p.detach().clone() for p in self.named.values()]

    def _place(self) -> dict[str, float]:
        return {"step": self.done, "epoch": round(self.done * self.plan.batch / len(self.models.blocks), 4)}


def run_together(
    plans: Sequence[Plan],
    models: Models,
    score: Callable[[PreparedModel], Score],
    say: Callable[[str], None] = print,
    seconds: float = math.inf,
) -> list[Result]:
    """Train all plans (of equal steps and evaluations) at once and evaluate each.

    Args:
        score: gives a model's result on the validation set.
        seconds: from now; after 100 steps the last runs are given up until the others fit into it.

    Returns:
        The results of the runs that were not given up, in order.
    """
    start = time.perf_counter()
    runs = [GraphedRun(plan, models) for plan in plans]
    cuda = models.device.type == "cuda"
    if cuda:
        for run in runs:
            run.capture()
        say(f"captured {len(runs)} runs in {time.perf_counter() - start:.1f} s")
    every = -(-plans[0].steps // plans[0].evaluations)
    begun = time.perf_counter()
    for step in range(1, plans[0].steps + 1):
        for run in runs:
            run.advance()
        evaluated = step % every == 0 or step == plans[0].steps
        if cuda and (step % 25 == 0 or evaluated):  # keep the queue short; the runs have streams of their own
            torch.cuda.synchronize()
        if step == 100:
            pace = (time.perf_counter() - begun) / 100 / len(runs)
            left = seconds - (time.perf_counter() - start)
            kept = max(1, int(min(len(runs), left / (pace * 1.05 * max(plans[0].steps - 100, 1)))))
            say(f"{1 / pace:.0f} steps/s; {kept} of {len(runs)} runs go on")
            runs = runs[:kept]
        if evaluated:
            for run in runs:
                first = (step - 1) // every * every
                run.write_log(first)
                run.evaluate(score)
            if cuda:  # the copies of the best weights are made before the next step changes them
                torch.cuda.synchronize()
            taken = time.perf_counter() - begun
            shown = ", ".join(f"{r.plan.name} {r.result.metrics[-1]['eval_perplexity']:.2f}" for r in runs)
            say(f"step {step}: {taken:.1f} s, {step * len(runs) / taken:.0f} steps/s; {shown}")
    return [run.result for run in runs]
