"""`tpctl metrics JOB`: a job's metrics as text, and files for those who scrape them."""

from __future__ import annotations

from enum import StrEnum
from importlib import resources
from typing import Annotated, Any

import typer

from tpctl import options
from tpctl.errors import CliError
from tpctl.exitcodes import for_verdict
from tpctl.jobs import place
from tpctl.jobs.place import JobDir
from tpctl.output import Envelope, Format, Output
from tpctl.verdict import Coverage, Finding, Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class File(StrEnum):
    """What is printed as it stands, and its name below `observability`."""

    scrape_config = "scrape-config"
    alert_rules = "alert-rules"
    dashboard = "dashboard"


FILES = {File.scrape_config: "scrape.yml", File.alert_rules: "alerts.yml", File.dashboard: "dashboard.json"}
YAML, JSON = "application/yaml", "application/json"


@options.command(
    app,
    epilog="Examples: tpctl metrics JOB | tpctl metrics JOB -o json | tpctl metrics --scrape-config | "
    "tpctl metrics --alert-rules | tpctl metrics --dashboard",
)
def metrics(
    out: Output,
    name: options.OneJobArgument = None,
    scrape_config: Annotated[
        bool, typer.Option("--scrape-config", help="Print an example configuration for Prometheus.")
    ] = False,
    alert_rules: Annotated[bool, typer.Option("--alert-rules", help="Print alert rules for Prometheus.")] = False,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Print a dashboard for Grafana.")] = False,
) -> None:
    """Print what a job counts, in Prometheus' text format; or a file for Prometheus or Grafana.

    The text is the same that `tpctl up --metrics-port` serves on 127.0.0.1. It needs no answer from the job: a wedged
    one has metrics too, and tpctl_control_up says that it does not answer.
    """
    asked = {File.scrape_config: scrape_config, File.alert_rules: alert_rules, File.dashboard: dashboard}
    files = [file for file, wanted in asked.items() if wanted]
    if len(files) + (name is not None) != 1:
        raise CliError("name a job, or one of the files", code="TP-7857", next_step="tpctl metrics --help")
    if files:
        _print_file(out, files[0])
        return
    assert name is not None
    _print_job(out, place.find(name))


def read_file(file: File) -> str:
    """One of the files that are printed as they stand."""
    return (resources.files("tpctl") / "observability" / FILES[file]).read_text(encoding="utf-8")


def _print_file(out: Output, file: File) -> None:
    text = read_file(file)
    if out.format in (Format.table, Format.wide):
        print(text, end="")
        return
    kind = JSON if file is File.dashboard else YAML
    out.emit(Envelope("tpctl.metrics", Verdict.PASS, _data(None, file, kind, text, [])))


def _print_job(out: Output, job: JobDir) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    from tpctl.jobs.metrics import CONTENT_TYPE, text

    exposition = text(job)
    families = [
        {
            "name": family.name,
            "type": family.type,
            "help": family.documentation,
            "samples": [
                {"name": sample.name, "labels": sample.labels, "value": sample.value} for sample in family.samples
            ],
        }
        for family in text_string_to_metric_families(exposition)
    ]
    answered = any(family["name"] == "tpctl_chunk_period_seconds" for family in families)
    verdict = Verdict.PASS if answered else Verdict.UNKNOWN
    words = "rank 0 told what it counts" if answered else "rank 0 does not answer: only what is seen from outside"
    step = f"tpctl status {job.name}"
    finding = Finding("job.metrics", verdict, words, next=step)
    if out.format in (Format.table, Format.wide):
        print(exposition, end="")
        if not answered:
            out.say(words)
    else:
        data = _data(job.name, None, CONTENT_TYPE, exposition, families)
        coverage = Coverage(1 + answered, 2)
        out.emit(Envelope("tpctl.metrics", verdict, data, (finding,), coverage, (step,), job.name))
    raise typer.Exit(int(for_verdict(verdict)))


def _data(name: str | None, file: File | None, kind: str, text: str, families: list[Any]) -> dict[str, Any]:
    return {
        "name": name,
        "file": file.value if file is not None else None,
        "content_type": kind,
        "text": text,
        "families": families,
    }
