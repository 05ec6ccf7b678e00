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
    """What came of it: perplexities, the curve as `metrics.jsonl` has it, the best weights, and the pace of all runs
    that went on together."""

    plan: Plan
    validation: float = math.inf
    best_step: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    steps_per_second: float = 0.0


class GraphedRuns:
    """Runs that share a graph (one of them, or several of one quantisation stacked): `advance` does a step of each."""

    def __init__(self, plans: Sequence[Plan], models: Models) -> None:
        first, blocks, device = plans[0], models.blocks, models.device
        torch.manual_seed(first.seed)
        self.models, self.results = models, [Result(plan) for plan in plans]
        self.loss = models.loss(first.quant, [plan.distill for plan in plans], first.batch)
        self.named = models.students(first.quant, len(plans))
        self.parameters = [p for p in self.named.values() if p.requires_grad]
        learned = {id(self.named[name]) for name in models.learned(first.quant)}
        groups = [
            ([p for p in self.parameters if id(p) not in learned], first.rate),
            ([p for p in self.parameters if id(p) in learned], first.rate * first.quant.scale_lr_ratio),
        ]
        cuda = device.type == "cuda"
        options: dict[str, Any] = {"fused": True, "capturable": True} if cuda else {}
        self.optimizer = torch.optim.AdamW(
            [{"params": ps, "lr": torch.tensor(rate, device=device)} for ps, rate in groups if ps],
            weight_decay=0.0, **options,
        )  # fmt: skip
        self.peaks = [float(g["lr"]) for g in self.optimizer.param_groups]
        self.fall = 1 - torch.arange(first.steps + 8, device=device) / first.steps
        self.order = torch.stack([_order(plan, len(blocks)) for plan in plans], 1).to(device)
        self.counter = torch.zeros(1, dtype=torch.long, device=device)
        terms = max(len(plan.distill.terms()) for plan in plans)
        self.log = torch.zeros(first.steps + 8, len(plans), 1 + terms, device=device)
        self.done = 0
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
        samples = self.order.index_select(0, self.counter).squeeze(0)
        fall = self.fall.index_select(0, self.counter).squeeze(0)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"].copy_(fall * peak)
        self.optimizer.zero_grad(set_to_none=True)
        with self.models.autocast(), self.models.checks():
            found = self.loss(self.named, samples)
        torch.stack([total for total, _ in found]).sum().backward()  # each run's total reads its own parameters only
        for run in range(len(found)):
            gradients = [p.grad[run] for p in self.parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            torch._foreach_mul_(gradients, (1.0 / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        for run, (total, values) in enumerate(found):
            logged = torch.cat([total.detach().view(1), values.detach().view(-1)]).float()
            self.log[:, run, : logged.numel()].index_copy_(0, self.counter, logged.unsqueeze(0))
        self.counter += 1

    def write_log(self, first: int) -> None:
        """Move the mean losses of the steps since `first` into the metrics.

        Raises:
            FloatingPointError: a loss that is not finite.
        """
        means = self.log[first : self.done].double().mean(0).cpu()
        for result, mean in zip(self.results, means, strict=True):
            if not bool(torch.isfinite(mean).all()):
                raise FloatingPointError(f"{result.plan.name}: the loss is not finite before step {self.done}")
            names = ["loss", *(f"loss_{t.kind}" for t in result.plan.distill.terms())]
            result.metrics.append(self._place(result) | dict(zip(names, mean.tolist(), strict=False)))

    def evaluate(self, score: Callable[[PreparedModel], Score]) -> None:
        """Score the weights of now on the validation set; the best are kept."""
        for run, result in enumerate(self.results):
            weights = [p.detach()[run] for p in self.named.values()]
            found = score(self.models.with_weights(result.plan.quant, weights))
            place = self._place(result)
            result.metrics.append(place | {"eval_loss": found.loss, "eval_perplexity": found.perplexity})
            if found.perplexity < result.validation:
                result.validation, result.best_step = found.perplexity, self.done
                result.weights = [w.clone() for w in weights]

    def _place(self, result: Result) -> dict[str, float]:
        return {"step": self.done, "epoch": round(self.done * result.plan.batch / len(self.models.blocks), 4)}


def _order(plan: Plan, blocks: int) -> Tensor:
    """Numbers of the blocks of each step, [steps + 8, batch]: epochs in an order that the seed gives."""
    chance = torch.Generator().manual_seed(plan.seed)
    epochs = -(-(plan.steps + 8) * plan.batch // blocks)
    shuffled = torch.cat([torch.randperm(blocks, generator=chance) for _ in range(epochs)])
    return shuffled[: (plan.steps + 8) * plan.batch].view(-1, plan.batch)


def _grouped(plans: Sequence[Plan], models: Models) -> list[list[Plan]]:
    """Plans that can share a graph, together."""
    groups: dict[Any, list[Plan]] = {}
    for plan in plans:
        key = (plan.quant, plan.rate, plan.batch) if models.stacks(plan.distill) else plan
        groups.setdefault(key, []).append(plan)
    return list(groups.values())


def run_together(
    plans: Sequence[Plan],
    models: Models,
    score: Callable[[PreparedModel], Score],
    say: Callable[[str], None] = print,
    seconds: float = math.inf,
) -> list[Result]:
    """Train all plans (of equal steps, evaluations) at once and evaluate each.

    Args:
        score: gives a model's result on the validation set.
        seconds: from now; after 100 steps the last graphs are given up until the others fit into it.

    Returns:
        The results of the runs that were not given up, runs of one graph side by side.
    """
    start = time.perf_counter()
    groups = [GraphedRuns(chosen, models) for chosen in _grouped(plans, models)]
    cuda = models.device.type == "cuda"
    if cuda:
        for group in groups:
            group.capture()
        say(f"captured {len(plans)} runs as {len(groups)} graphs in {time.perf_counter() - start:.1f} s")
    steps, count = plans[0].steps, len(plans)
    every = -(-steps // plans[0].evaluations)
    begun = time.perf_counter()
    for step in range(1, steps + 1):
        for group in groups:
            group.advance()
        evaluated = step % every == 0 or step == steps
        if cuda and (step % 25 == 0 or evaluated):  # keep the queue short; the groups have streams of their own
            torch.cuda.synchronize()
        if step == 100:
            pace = (time.perf_counter() - begun) / 100
            left = seconds - (time.perf_counter() - start)
            kept = max(1, int(min(len(groups), len(groups) * left / (pace * 1.05 * max(steps - 100, 1)))))
            say(f"{count / pace:.0f} steps/s; {kept} of {len(groups)} graphs go on")
            groups = groups[:kept]
            count = sum(len(group.results) for group in groups)
        if evaluated:
            for group in groups:
                group.write_log((step - 1) // every * every)
                group.evaluate(score)
            if cuda:  # the copies of the best weights are made before the next step changes them
                torch.cuda.synchronize()
            taken = time.perf_counter() - begun
            results = [result for group in groups for result in group.results]
            for result in results:
                result.steps_per_second = step * count / taken
            shown = ", ".join(f"{r.plan.name} {r.metrics[-1]['eval_perplexity']:.2f}" for r in results)
            say(f"step {step}: {taken:.1f} s, {step * count / taken:.0f} steps/s; {shown}")
    return [result for group in groups for result in group.results]
