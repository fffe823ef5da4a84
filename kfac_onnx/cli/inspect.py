"""`kfac-onnx inspect MODEL`: what was inserted, in tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kfac_onnx.cli.options import chosen_providers, common, html_option, model_argument, provider_option
from kfac_onnx.cli.output import print_accounts, print_json, print_refusals, print_table, say
from kfac_onnx.cli.pages import require_page_place, save_page
from kfac_onnx.cli.placement import placement_of, print_placement
from kfac_onnx.errors import UserError
from kfac_onnx.markup import quantity

if TYPE_CHECKING:
    from kfac_onnx.ranks.planner import RankPlan
    from kfac_onnx.reports.inspect import Inspection, SiteReport
    from kfac_onnx.runtime.saved.saved_run import SavedRun
    from kfac_onnx.runtime.step.mapped_tables import TableOnDisk

__all__ = ["command"]


@click.command("inspect", short_help="Show what was inserted into a model.")
@model_argument
@click.option("--lookups", type=click.IntRange(min=0), metavar="N", help="Give costs for N lookups per step.")
@click.option("--nodes", is_flag=True, help="Also list every inserted node with its phase.")
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    metavar="P",
    help="What each of P ranks would hold and, with --lookups of one rank, send at most in a step.",
)
@provider_option
@html_option
@common
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    lookups: int | None,
    nodes: bool,
    ranks: int | None,
    provider: tuple[str, ...],
    html: str | None,
    as_json: bool,
) -> None:
    """Show what was inserted into the transformed MODEL: state, cost, and when each part runs.

    Of a folder of `train --tables-in` it is its files. Of a checkpoint, or a folder of them, also how far the
    run came and how well its factors are conditioned.
    With --provider also where each part runs: what falls back to the host, and what a step copies. Where the
    provider works that is what ONNX Runtime does here; for cuda it is predicted elsewhere. With --html
    also the graph drawn, with cost, state and placement of each node. Whatever is found, the exit code is 0:
    it is shown, not checked.
    """
    from kfac_onnx.disk.models import load_model
    from kfac_onnx.reports.inspect import inspect
    from kfac_onnx.runtime.saved.saved_run import is_checkpoint, read_run
    from kfac_onnx.runtime.step.mapped_tables import tables_on_disk

    require_page_place(html, model)
    if tables := tables_on_disk(model):
        if html is not None:
            raise UserError(
                f"'{model}' is a folder of tables, which has no graph to draw", help="give the model"
            )
        if as_json:
            print_json({"tables_on_disk": [table.to_json() for table in tables]})
        else:
            _print_tables(tables)
        return
    run = read_run(model) if is_checkpoint(model) else None
    loaded = load_model(model) if run is None else run.model
    report = inspect(loaded)
    placement, why = placement_of(loaded, chosen_providers(ctx, provider)[0]) if provider else (None, None)
    plan = None
    if ranks is not None:
        from kfac_onnx.ranks.planner import plan_ranks

        plan = plan_ranks(loaded, ranks, lookups)
    if html is not None:
        from kfac_onnx.reports.pages import inspection_page

        save_page(html, inspection_page(loaded, model, report=report, placement=placement))
    if as_json:
        placed = {} if placement is None else {"placement": placement.to_json() | {"predicted_because": why}}
        planned = {} if plan is None else {"ranks": plan.to_json()}
        print_json(
            report.to_json() | ({} if run is None else {"checkpoint": run.to_json()}) | placed | planned
        )
        return
    if run is not None:
        _print_run(run)
        for line in (run.settings or "").splitlines():
            if not line.startswith("#"):
                say(f"  {line}")
    for site in report.sites:
        _print_site(site, lookups)
    _print_others(report)
    if nodes:
        print_table(
            "Inserted nodes",
            ["phase", "node", "operator", "for", "by pass"],
            [(n.phase, n.name, n.operator, n.site, n.made_by) for n in report.nodes if n.made_by is not None],
        )
    if plan is not None:
        _print_ranks(plan)
    if placement is not None:
        print_placement(placement, why)
    say("nodes by phase: " + ", ".join(f"{name} {n}" for name, n in report.nodes_by_phase.items()))
    say(f"pipeline: {report.pipeline or 'none'}")


def _print_tables(tables: list[TableOnDisk]) -> None:
    print_table(
        "Tables in their files",
        ["table", "shape", "size", "on the disk", "file"],
        [
            (
                f"{t.parameter} {t.dtype}",
                " x ".join(map(str, t.shape)),
                quantity(t.nbytes, "B"),
                quantity(t.on_disk, "B"),
                t.path.name,
            )
            for t in tables
        ],
    )
    say(
        "a run is changing them, or was killed: they are of use with its checkpoint alone"
        if tables[0].state == "open"
        else "closed: they are what their run left at its end"
    )


def _print_ranks(plan: RankPlan) -> None:
    if plan.refused is not None:
        say(f"on {plan.ranks} ranks: {plan.refused}")
        return
    rows = [(name, "by row, id mod P", quantity(size, "B")) for name, size in plan.sharded.items()]
    rows.append(("all else", "on each rank", quantity(plan.replicated, "B")))
    print_table(f"On {plan.ranks} ranks", ["what", "placement", "per rank"], rows)
    if plan.sent is not None:
        say(f"a rank sends at most {quantity(plan.sent, 'B')} per step, if all of its lookups are distinct")


def _print_run(run: SavedRun) -> None:
    say(
        f"{run.path}: {run.committed} steps, {run.skipped} skipped, {run.position} batches consumed,"
        f" {run.root_fallbacks} roots computed on the host"
    )
    print_table(
        "Output factors",
        ["table", "smallest", "largest", "damping", "condition", "asymmetry", "root off by "],
        [
            (root.parameter, *(f"{x:.3g}" for x in (
                root.smallest, root.largest, root.damping, root.condition, root.asymmetry, root.drift
            )))
            for root in run.roots
        ],
    )  # fmt: skip


def _print_site(site: SiteReport, lookups: int | None) -> None:
    tied = ", tied: the whole table is updated at each step" if site.tied else ""
    say(f"{site.parameter}: {site.vocab_size} x {site.embedding_dim} {site.dtype}{tied}")
    say(f"  lookups per step  {site.lookups}")
    say(f"  statistics        {site.statistics}")
    if site.decay:
        say(f"  decay             {site.decay:g} times the rate in each step")
    for name, shape in site.factors.items():
        say(f"  factor            {name} {list(shape)}")
    share = site.state_bytes / site.adam_bytes if site.adam_bytes else 0.0
    say(
        f"  state             {quantity(site.state_bytes, 'B')}; "
        f"Adam would keep {quantity(site.adam_bytes, 'B')} ({share:.1%} of it)"
    )
    say(f"  each step         {site.step_cost.text(lookups)}")
    say(f"  each refresh      {site.refresh_cost.text(lookups)}")
    if site.statistics_cost.flops:
        say(f"  each update of G  {site.statistics_cost.text(lookups)}")
    print_table(
        "",
        ["phase", "operator", "nodes ", "what it does", "cost"],
        [(g.phase, g.operator, len(g.nodes), g.meaning, g.cost.text(lookups)) for g in site.groups],
    )


def _print_others(report: Inspection) -> None:
    if report.others:
        print_table(
            "Other parameters",
            ["parameter", "shape", "optimizer", "state "],
            [(p.name, list(p.shape), p.optimizer, quantity(p.state_bytes, "B")) for p in report.others],
        )
    print_refusals(report.refused)
    print_accounts(report.accounts)
