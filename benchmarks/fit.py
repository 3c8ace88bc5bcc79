"""Fits the constants of the cost estimates to measured records, and says how well they then choose; needs no GPU.

    python -m benchmarks.fit [--root DIR] [--rooms scalar_decay,delta] [--rounds 400]

Every room with a model (`kernels/_shared/fitted.py`) and with records gets its costs.json anew. Minimised by gradient steps: the error
of log(estimated / measured) over all timed outcomes, with outliers bounded, and the regret of the choice. Beside the fit of
everything, one half of the keys is fitted alone and judged on the other.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pathlib
import time
from typing import Any, NamedTuple

import torch

from fla_dispatch.device import hypothetical
from fla_dispatch.kernels._shared.fitted import Constants, Model, Numbers, Shape, Step, Work, micros
from fla_dispatch.kernels.delta import costs as delta
from fla_dispatch.kernels.scalar_decay import costs as scalar_decay
from fla_dispatch.problem import Problem
from fla_dispatch.tuning import store as stores
from fla_dispatch.tuning.keys import parse_key

from . import regret

MODELS: dict[str, Model] = {model.recurrence: model for model in (scalar_decay.MODEL, delta.MODEL)}

#: How the names of the host's terms begin that are added to another's.
ADDED = ("tma", "packed", "segments", "split", "state")

#: How many blocks a unit may be found to hold.
RESIDENT = (1, 2, 3, 4, 6, 8)

#: Log errors beyond this count linearly; estimates this close share a choice; weights of regret and of its square.
BOUND, NEAR, REGRET, WORST = 0.1, 0.02, 1.0, 20.0

#: What draws constants to each other where measurements do not tell: of a shape to its class and config, of classes
#: to each other and of a token-by-token launch to a sweep's.
TOGETHER, ALIKE = 0.2, 0.02


#: Numbers that all shapes share.
SHARED = ("lead", "scan", "start", "start_token", "memory")


class Sample(NamedTuple):
    """One timed outcome; record: which it was a candidate of."""

    record: int
    text: str
    key: Problem
    variant: str
    config: Any
    shape: Shape
    us: float


def samples(model: Model, root: pathlib.Path | None, device: str, regime: str) -> list[Sample]:
    """All timed outcomes of a model's variants, of the kernels as they are now. Fields that a config lacks are its defaults."""
    store, here = stores.Store(None, (), root or stores.SHIPPED), hypothetical(device)
    found = []
    for i, hit in enumerate(store.records(recurrence=model.recurrence)):
        if hit.environment.regime != regime or f"@{device}?" not in hit.record.key:
            continue
        key, backward = parse_key(hit.record.key, here), hit.record.direction == "backward"
        for o in regret.current(hit.record):
            if regret.measured(o, 2) and o.timing is not None and o.variant in model.configs:
                config = model.configs[o.variant](**(o.config or {}))
                text = f"{hit.record.direction} {hit.record.key}"
                found.append(Sample(i, text, key, o.variant, config, model.shape(o.variant, key, config, backward), o.timing.median_us))
    return found


def _index(names: list[Any]) -> tuple[list[Any], torch.Tensor]:
    """The distinct names, sorted, and where each of the given ones stands among them."""
    distinct = sorted(set(names))
    place = {name: i for i, name in enumerate(distinct)}
    return distinct, torch.tensor([place[name] for name in names])


class Fit:
    """The parameters, as logarithms, of one fit."""

    def __init__(self, model: Model, given: list[Sample]) -> None:
        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64)

        self.model = model
        self.us = column([s.us for s in given])
        every = [model.work(s.key, s.config, s.shape.backward) for s in given]
        self.work = Work(*(column([float(w[i]) for w in every]) for i in range(len(Work._fields))))
        self.records, self.record = _index([s.record for s in given])
        best = torch.full((len(self.records),), math.inf, dtype=torch.float64)
        self.loss_of = (self.us / best.scatter_reduce(0, self.record, self.us, "amin")[self.record]).log()
        self.shapes, self.shape = _index([s.shape for s in given])
        self.rough = torch.stack([column([getattr(model.rough(s), name) for s in self.shapes]) for name in ("alone", "shared", "local")])
        _, self.family = _index([s[:4] for s in self.shapes])
        _, self.config = _index([s[4:] for s in self.shapes])
        self.classes, self.class_ = _index([s.shape.group for s in given])
        terms = [model.terms(s.variant, s.key, s.config, s.shape.backward) for s in given]
        self.hosts, _ = _index([name for row in terms for name in row])
        self.likes = [
            (i, self.hosts.index(like))
            for i, name in enumerate(self.hosts)
            if (like := name.replace("recurrent", "sweep")) != name and like in self.hosts
        ]
        self.terms = torch.zeros(len(given), len(self.hosts), dtype=torch.float64)
        for i, row in enumerate(terms):
            self.terms[i, [self.hosts.index(name) for name in row]] = 1.0
        self.chunked = torch.tensor([s.shape.BT > 0 for s in given])
        self.resident = torch.full((len(self.shapes),), 2.0, dtype=torch.float64)
        start = {
            "host": column([math.log(3.0 if n.startswith(ADDED) else 60.0) for n in self.hosts]),
            "passing": torch.full((len(self.classes),), math.log(0.5), dtype=torch.float64),
            "shared": column([math.log(5.0), math.log(0.5), math.log(0.3), math.log(3.0), 1.0]),  # memory as the logit of a share
            "families": torch.zeros(3, int(self.family.max()) + 1, dtype=torch.float64),
            "configs": torch.zeros(3, int(self.config.max()) + 1, dtype=torch.float64),
            "rest": torch.zeros(3, len(self.shapes), dtype=torch.float64),
        }
        self.values = {name: value.requires_grad_() for name, value in start.items()}

    def steps(self) -> torch.Tensor:
        """`alone`, `shared` and `local`, [3, shapes]."""
        v = self.values
        return self.rough * (v["families"][:, self.family] + v["configs"][:, self.config] + v["rest"]).exp()

    def shared(self) -> torch.Tensor:
        """The numbers named in SHARED."""
        found = self.values["shared"]
        return torch.cat((found[:-1].exp(), found[-1:].sigmoid()))

    def errors(self) -> torch.Tensor:
        """log(estimated / measured) of each sample."""
        v, steps = self.values, self.steps()[:, self.shape]
        lead, scan, start, start_token, memory = self.shared()
        n = Numbers(
            self.terms @ v["host"].exp(), lead, steps[0], steps[1], self.resident[self.shape], steps[2],
            torch.where(self.chunked, start, start_token), v["passing"].exp()[self.class_], scan, memory,
        )  # fmt: skip
        return (micros(self.work, n) / self.us).log()

    def penalty(self, errors: torch.Tensor) -> torch.Tensor:
        """Of the choice: expected log regret where nearly equal estimates share it, and its square; a mean over records."""
        estimates = (errors + self.us.log()) / NEAR
        least = torch.full((len(self.records),), math.inf, dtype=torch.float64).scatter_reduce(0, self.record, estimates.detach(), "amin")
        weights = (least[self.record] - estimates).exp()
        zero = torch.zeros(len(self.records), dtype=torch.float64)
        total, lost = (zero.index_add(0, self.record, x) for x in (weights, weights * self.loss_of))
        expected = lost / total
        return (REGRET * expected + WORST * expected**2).mean()

    def bounded(self, errors: torch.Tensor) -> torch.Tensor:
        return BOUND * ((errors**2 + BOUND**2).sqrt() - BOUND)

    def prior(self) -> torch.Tensor:
        v = self.values
        alike = sum((v[name] ** 2).sum() for name in ("families", "configs")) + ((v["passing"] - v["passing"].mean()) ** 2).sum()
        alike += sum((v["host"][i] - v["host"][j]) ** 2 for i, j in self.likes)
        return (TOGETHER * (v["rest"] ** 2).sum() + ALIKE * alike) / len(self.us)

    def run(self, rounds: int, weight: float) -> None:
        """Adam with a falling rate; the regret counts by `weight`."""
        optimiser = torch.optim.Adam(self.values.values(), lr=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.05, total_steps=rounds, pct_start=0.1, cycle_momentum=False)
        for _ in range(rounds):
            optimiser.zero_grad()
            errors = self.errors()
            loss = self.bounded(errors).mean() + self.prior() + (weight * self.penalty(errors) if weight else 0.0)
            loss.backward()
            optimiser.step()
            schedule.step()

    def occupy(self, rounds: int) -> None:
        """How many blocks a unit holds: per shape what fits its samples best when everything is fitted with that number."""
        tried = []
        for resident in RESIDENT:
            self.resident.fill_(float(resident))
            self.run(rounds, 0.0)
            with torch.no_grad():
                tried.append(torch.zeros(len(self.shapes), dtype=torch.float64).index_add(0, self.shape, self.bounded(self.errors())))
        self.resident = torch.tensor(RESIDENT, dtype=torch.float64)[torch.stack(tried).argmin(0)]

    def constants(self) -> Constants:
        host, passing = (self.values[name].detach().exp().tolist() for name in ("host", "passing"))
        alone, together, local = self.steps().detach().tolist()
        steps = {
            s: Step(round(a, 5), round(b, 5), int(r), round(c, 5))
            for s, a, b, r, c in zip(self.shapes, alone, together, self.resident.tolist(), local, strict=True)
        }
        rest = dict(zip(SHARED, self.shared().tolist(), strict=True))
        rest |= {"host": sum(host) / len(host), "passing": math.exp(sum(map(math.log, passing)) / len(passing))}

        def named(names: list[str], values: list[float]) -> dict[str, float]:
            return {name: round(value, 5) for name, value in zip(names, values, strict=True)}

        return Constants(self.model, named(self.hosts, host), named(self.classes, passing), named(list(rest), list(rest.values())), steps)


def fitted(model: Model, given: list[Sample], rounds: int) -> Constants:
    fit = Fit(model, given)
    fit.occupy(rounds // 5)
    fit.run(rounds, 0.0)
    fit.run(rounds, 1.0)
    return fit.constants()


class Row(NamedTuple):
    """A record under an estimate: what its choice among the timed costs over the best, and each log(estimated / measured)."""

    regret: float
    text: str
    chosen: Sample
    best: Sample
    errors: list[float]


def judged(given: list[Sample], constants: Constants) -> list[Row]:
    """The choice of the estimate among what was timed, record by record."""
    records: dict[int, list[tuple[float, Sample]]] = {}
    for s in given:
        records.setdefault(s.record, []).append((constants.micros(s.variant, s.key, s.config, s.shape.backward), s))
    found = []
    for rows in records.values():
        chosen, best = min(rows, key=lambda r: r[0])[1], min(rows, key=lambda r: r[1].us)[1]
        found.append(Row(chosen.us / best.us, chosen.text, chosen, best, [math.log(us / s.us) for us, s in rows]))
    return found


def summary(rows: list[Row]) -> str:
    mean = math.exp(sum(math.log(r.regret) for r in rows) / len(rows))
    worst, above = max(r.regret for r in rows), sum(r.regret > 1.25 for r in rows)
    errors = sorted(math.exp(e) for r in rows for e in r.errors)
    parts = (
        f"{100 * q:g}%: {errors[min(len(errors) - 1, int(q * len(errors)))]:.2f}" for q in (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
    )
    return (
        f"{len(rows)} records, regret {mean:.4f} in the geometric mean, {worst:.2f} at worst, {above} above 1.25\n"
        f"    estimated / measured of {len(errors)} outcomes: {', '.join(parts)}"
    )


def half(s: Sample) -> bool:
    """Which half of the keys: one key's directions, and the forwards with and without gradients, stay together."""
    name = s.text.partition(" ")[2].removesuffix("&grad")
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def fit_room(model: Model, every: list[Sample], rounds: int, worst: int) -> Constants:
    """Fit a room, in halves and in whole, and say how it went; the new constants are in force."""
    left, right = [s for s in every if half(s)], [s for s in every if not half(s)]
    for name, known, other in (("first", left, right), ("second", right, left)):
        if known and other:
            print(f"fitted on the {name} half, judged on the other: {summary(judged(other, fitted(model, known, rounds)))}", flush=True)
    constants = fitted(model, every, rounds)
    rows = judged(every, constants)
    print(f"fitted on everything: {summary(rows)}")
    for r in sorted(rows, key=lambda r: -r.regret)[:worst]:
        print(f"{r.regret:.2f} {r.best.us:8.1f} us {r.text}")
        print(f"     chose {r.chosen.variant} {r.chosen.config}\n     best  {r.best.variant} {r.best.config}")
    print("estimates that are farthest off:")
    for r in sorted(rows, key=lambda r: -max(map(abs, r.errors)))[:worst]:
        print(f"{math.exp(max(r.errors, key=abs)):.2f} {r.best.us:8.1f} us {r.text}")
    model.install(constants)
    return constants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=pathlib.Path)
    parser.add_argument("--rooms", default=",".join(MODELS))
    parser.add_argument("--out", type=pathlib.Path, help="a directory that gets ROOM.json instead of each room's costs.json")
    parser.add_argument("--device", default="sm90")
    parser.add_argument("--regime", default="eager")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--worst", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model in (MODELS[name] for name in given.rooms.split(",")):
        torch.manual_seed(0)
        begin = time.perf_counter()
        every = samples(model, given.root, given.device, given.regime)
        if not every:
            print(f"{model.recurrence}: no timed outcome of its code as it is now; its constants stay")
            continue
        print(f"{model.recurrence}:")
        constants = fit_room(model, every, given.rounds, given.worst)
        chosen = regret.regrets(given.root, given.device, given.regime, model.recurrence)
        print(f"what the dispatcher would choose: {regret.summary(chosen)}")
        about = {
            "outcomes": len(every), "records": len({s.record for s in every}), "device": given.device, "regime": given.regime,
        }  # fmt: skip
        path = model.file if given.out is None else given.out / f"{model.recurrence}.json"
        path.write_text(constants.text(about), encoding="utf-8")
        print(f"{path}, {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
