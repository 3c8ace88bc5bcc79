"""`fla-dispatch cache list | show | pack | merge | export | import | gc | path`: the records that are kept, needing no torch.

This module is imported with the command line, so it imports typer alone; the store is imported when a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UnknownNameError

if TYPE_CHECKING:
    from ..tuning.records import Record
    from ..tuning.store import Found, Store

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The records of what was measured, proven and chosen.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Tier = Annotated[str | None, typer.Option(help="Only records of this tier: user, site or shipped. Default: as the dispatcher finds them.")]
Recurrence = Annotated[str | None, typer.Option(help="Only records of this recurrence.")]
Where = Annotated[str | None, typer.Option("--environment", help="Only environments whose directory contains this text.")]


def _store() -> Store:
    from ..tuning.store import get_store

    return get_store()


def _select(tier: str | None, recurrence: str | None, environment: str | None, key: str = "") -> list[Found]:
    """Records by what the options say, in order of environment, key and direction."""
    from ..tuning.store import TIERS

    if tier is not None and tier not in TIERS:
        raise UnknownNameError(f"--tier: expected one of {', '.join(TIERS)}, got {tier!r}.")
    found = [hit for hit in _store().records(recurrence=recurrence, tier=tier) if (environment or "") in hit.environment.directory]
    found = [hit for hit in found if key in hit.record.key or (key and Path(hit.source).name.startswith(key))]
    return sorted(found, key=lambda hit: (hit.environment.directory, hit.record.recurrence, hit.record.key, hit.record.direction))


def _summary(hit: Found) -> dict[str, Any]:
    """One line of `list`."""
    record, outcome = hit.record, hit.record.outcome()
    return {
        "environment": hit.environment.directory,
        "recurrence": record.recurrence,
        "key": record.key,
        "direction": record.direction,
        "choice": None if record.choice is None else record.choice.fingerprint,
        "rule": None if record.choice is None else record.choice.rule,
        "margin": None if record.choice is None else record.choice.margin,
        "median_us": None if outcome is None or outcome.timing is None else outcome.timing.median_us,
        "outcomes": len(record.outcomes),
        "failures": sum(o.status != "ok" for o in record.outcomes),
        "tier": hit.tier,
        "origin": record.origin,
        "created": record.created,
        "source": hit.source,
    }


@app.command("list", short_help="Every record in one line.")
def _list(tier: Tier = None, recurrence: Recurrence = None, environment: Where = None, json: Json = False) -> None:
    """Every record in one line, and the files that are none."""
    from . import output

    rows = [_summary(hit) for hit in _select(tier, recurrence, environment)]
    bad = [u._asdict() for u in _store().unreadable]
    if json:
        output.print_json({"records": rows, "unreadable": bad})
        return
    out = output.console()
    before = ("", "")
    for r in rows:  # keys are long: a line for each, and one below it for each direction
        if r["environment"] != before[0]:
            out.print(r["environment"])
        if (r["environment"], r["key"]) != before:
            out.print("  " + r["key"], soft_wrap=True)
        before = r["environment"], r["key"]
        failed = f", {r['failures']} of {r['outcomes']} failed" if r["failures"] else ""
        about = f"({r['tier']}, {r['created'][:10]}{failed})"
        out.print(f"    {r['direction']:9}{_microseconds(r['median_us']):>8}  {r['choice'] or 'nothing passed'}  {about}", soft_wrap=True)
    for u in bad:
        out.print(f"passed over: {u['source']}: {u['reason']}")
    if not rows:
        out.print("no records; `fla-dispatch cache path` says where they are looked for")


def _microseconds(value: float | None) -> str:
    from . import output

    return output.seconds(None if value is None else value * 1e-6)


@app.command("show", short_help="Records with every outcome.")
def _show(
    key: Annotated[str, typer.Argument(help="A part of the key, or the beginning of the file's name.")],
    tier: Tier = None,
    recurrence: Recurrence = None,
    environment: Where = None,
    json: Json = False,
) -> None:
    """Records with every outcome: times, errors beside what was allowed, and why candidates failed."""
    from . import output

    found = _select(tier, recurrence, environment, key)
    if not found:
        raise UnknownNameError(f"no record's key contains {key!r}; `fla-dispatch cache list` lists them.")
    if json:
        output.print_json([{**_summary(hit), "record": hit.record.model_dump(mode="json")} for hit in found])
        return
    out = output.console()
    for hit in found:
        record, choice = hit.record, hit.record.choice
        out.print(f"{record.recurrence} {record.direction} {record.key}\n  {hit.environment.directory}\n  {hit.tier}: {hit.source}")
        out.print(f"  {record.origin} {record.created}" + "".join(f", {name} {v}" for name, v in sorted(record.versions.items())))
        if choice is not None:
            out.print(f"  chosen {choice.fingerprint} by {choice.rule}, margin {choice.margin:.2f}, {len(choice.band)} in the band")
        out.print(output.table("", ["candidate", "status", "median", "error / allowed", "detail"], _outcomes(record)))


def _outcomes(record: Record) -> list[list[str]]:
    rows = []
    for o in sorted(record.outcomes, key=lambda o: (o.timing is None, o.timing.median_us if o.timing else 0.0, o.fingerprint)):
        proof = o.certificate
        worst = "-"
        if proof is not None and proof.errors:
            ratios = {name: error / (proof.tolerances.get(name) or 1.0) for name, error in proof.errors.items()}
            name = max(ratios, key=lambda n: ratios[n])
            worst = f"{name} {proof.errors[name]:.2g} / {proof.tolerances.get(name, float('nan')):.2g}"
        current = record.kernels.get(o.variant, o.kernel_hash) == o.kernel_hash
        status = o.status if current else f"{o.status} (older code)"
        rows.append([o.fingerprint, status, _microseconds(o.timing.median_us if o.timing else None), worst, o.detail.split("\n")[0][:80]])
    return rows


@app.command("pack", short_help="Write packs for a site or for shipping.")
def _pack(
    out: Annotated[Path, typer.Option(help="Root of the packs: a site's directory, or the package's tuning/data.")],
    shipped: Annotated[bool, typer.Option("--shipped", help="Mark the records as shipped ones.")] = False,
    tier: Tier = "user",
    recurrence: Recurrence = None,
    environment: Where = None,
    json: Json = False,
) -> None:
    """Write one file per environment and recurrence, merged with the packs that are there."""
    from ..tuning import packs

    found = _select(tier, recurrence, environment)
    written = packs.write_packs(out, found, "shipped" if shipped else None)
    _report(json, {"records": len(found), "files": [str(p) for p in written]})


@app.command("merge", short_help="Merge another directory's records into the user's.")
def _merge(
    sources: Annotated[list[Path], typer.Argument(help="Cache directories, or roots of packs.")],
    json: Json = False,
) -> None:
    """Merge the records of other directories into the user's own: every outcome is kept, choices are made anew."""
    from ..tuning import packs
    from ..tuning.store import Store

    records = []
    for source in sources:
        if not source.is_dir():
            raise UnknownNameError(f"{source} is no directory.")
        root = source / "v1" if (source / "v1").is_dir() else source
        records += [(hit.environment, hit.record) for hit in Store(root).records()]
    _finish(json, packs.merge_into(_store(), records))


@app.command("export", short_help="Write records to one file.")
def _export(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    tier: Tier = None,
    recurrence: Recurrence = None,
    environment: Where = None,
    json: Json = False,
) -> None:
    """Write records with their environments to one file, for `import` elsewhere."""
    from ..tuning import packs

    _report(json, {"records": packs.write_export(out, _select(tier, recurrence, environment)), "files": [str(out)]})


@app.command("import", short_help="Merge an exported file into the user's records.")
def _import(
    files: Annotated[list[Path], typer.Argument(help="Files that `cache export` wrote.")],
    json: Json = False,
) -> None:
    """Merge exported files into the user's own records; all of a file or nothing of it."""
    from ..tuning import packs

    records = [pair for file in files for pair in packs.read_export(file)]
    _finish(json, packs.merge_into(_store(), records))


@app.command("gc", short_help="Remove files that serve nobody.")
def _gc(
    older_than: Annotated[float | None, typer.Option(help="Also records measured more than this many days ago.")] = None,
    stale: Annotated[bool, typer.Option("--stale", help="Also records none of whose outcomes is of the present code.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List them, remove nothing.")] = False,
    json: Json = False,
) -> None:
    """Remove from the user's directory what killed writers left and what is no record of this version."""
    from ..tuning import packs

    found = packs.garbage(_store(), older_than_days=older_than, stale=_is_stale if stale else None)
    removed = []
    for path, reason in found:
        if not dry_run:
            path.unlink(missing_ok=True)
        removed.append({"path": str(path), "reason": reason})
    _report(json, {"removed" if not dry_run else "would remove": removed})


def _is_stale(record: Record) -> bool:
    """Whether no outcome belongs to a variant as it is now; this imports the rooms, and so torch."""
    from .. import registry
    from ..tuning.hashing import kernel_hash

    if record.recurrence not in registry.recurrence_names():
        return True
    hashes = {v.name: kernel_hash(v) for v in registry.get_recurrence(record.recurrence).variants}
    return all(hashes.get(o.variant) != o.kernel_hash for o in record.outcomes)


@app.command("path", short_help="Where records are kept and looked for.")
def _path(json: Json = False) -> None:
    """Where records are kept and looked for, in order."""
    from . import output

    rows = [{"tier": place.tier, "path": str(place.root), "exists": place.root.is_dir()} for place in _store().places]
    if json:
        output.print_json(rows)
        return
    for row in rows:
        print(f"{row['tier']:8} {row['path']}" + ("" if row["exists"] else "  (not there yet)"))


def _finish(json: bool, merged: Any) -> None:
    _report(json, merged._asdict())
    if merged.unkept:
        raise typer.Exit(1)


def _report(json: bool, document: dict[str, Any]) -> None:
    """Print what a command did, as JSON or as `name: value` lines."""
    from . import output

    if json:
        output.print_json(document)
        return
    for name, value in document.items():
        if isinstance(value, list):
            print(f"{name}:" + (" nothing" if not value else ""))
            for item in value:
                print("  " + (item if isinstance(item, str) else "  ".join(map(str, item.values()))))
        else:
            print(f"{name}: {value}")
