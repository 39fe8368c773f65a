"""saga check, export, diff, canvas and graph as commands: exit codes, JSON, and errors in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from saga.cli import main

ROOT = Path(__file__).parents[2]
ORDER_SAGA = [
    f"examples.order_saga.{service}.service"
    for service in ("order", "inventory", "users", "shipping", "analytics")
]
SHOP = """
from dataclasses import dataclass
from outbox.events import Registry
from saga import Participant

registry = Registry()

@registry.event("shop.placed", key="id")
@dataclass(frozen=True)
class Placed:
    id: str

@registry.event("shop.packed", key="id")
@dataclass(frozen=True)
class Packed:
    id: str

@registry.event("shop.too_late", key="id")
@dataclass(frozen=True)
class TooLate:
    id: str

shop = Participant("shop", registry=registry)
shop.starts(Placed, nothing_to_undo="nothing is written")

@shop.join(Packed, completes=True)
def end(packed, session): ...

pack = Participant("pack", registry=registry)

@pack.step(on=Placed, emits=Packed)
def pack_it(placed, session): ...
"""
WHOLE = (
    SHOP
    + """
@pack_it.compensation
def unpack(placed, packed, session): ...

@shop.deadline(minutes=15, rejects=TooLate)
def give_up(placed, session): ...
"""
)
BROKEN = SHOP.replace("emits=Packed", "emits=Placed")


def line_of(text: str, source: str) -> int:
    return next(n for n, line in enumerate(source.splitlines(), start=1) if text in line)


@pytest.fixture(autouse=True)
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def written(source: str, name: str = "shopmod") -> str:
    Path(f"{name}.py").write_text(dedent(source))
    return name


def saga(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


# ---- check ----


def test_a_sound_choreography_exits_with_0() -> None:
    result = saga("check", written(WHOLE))
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "0 errors, 0 warnings\n"


def test_warnings_alone_exit_with_0_and_say_file_and_line() -> None:
    result = saga("check", written(SHOP))
    assert result.exit_code == 0
    waits, acts = result.stdout.splitlines()
    line = line_of("@shop.join", SHOP)
    assert waits.startswith(f"shopmod.py:{line}: warning no-deadline: shop.end waits for others")
    line = line_of("@pack.step", SHOP)
    assert acts.startswith(f"shopmod.py:{line}: warning no-compensation: pack.pack_it ")
    assert result.stderr == "0 errors, 2 warnings\n"


def test_an_error_exits_with_1_and_says_file_and_line() -> None:
    result = saga("check", written(BROKEN))
    assert result.exit_code == 1
    assert f"shopmod.py:{line_of('@shop.join', BROKEN)}: error unproduced-event:" in result.stdout


def test_findings_are_json_for_programs() -> None:
    result = saga("check", "--json", written(BROKEN))
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["errors"] == len(
        [one for one in document["findings"] if one["severity"] == "error"]
    )
    one = next(one for one in document["findings"] if one["rule"] == "unproduced-event")
    assert (one["file"], one["line"]) == ("shopmod.py", line_of("@shop.join", BROKEN))
    assert one["message"]


def test_one_participant_of_a_module_can_be_named() -> None:
    result = saga("check", written(WHOLE) + ":pack")
    assert result.exit_code == 1
    assert "pack.pack_it emits shop.packed, and nobody takes it" in result.stdout


def test_contracts_from_files_are_checked_with_modules() -> None:
    module = written(WHOLE)
    assert saga("export", f"{module}:pack", "-o", "pack.json").exit_code == 0
    result = saga("check", f"{module}:shop", "pack.json")
    assert (result.exit_code, result.stdout) == (0, "")


def test_the_order_saga_is_sound() -> None:
    """In a process of its own, as registries are filled by importing."""
    ran = subprocess.run(
        [Path(sys.executable).parent / "saga", "check", *ORDER_SAGA],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "0 errors, 0 warnings\n")


# ---- what cannot be used: exit code 2, one line ----


UNUSABLE = {
    "import raises": ("import os\nos.environ['NOT_SET_HERE']\n", "KeyError: 'NOT_SET_HERE'"),
    "import exits": ("import sys\nsys.exit('no settings')\n", "SystemExit: no settings"),
    "syntax": ("def (:\n", "SyntaxError"),
    "import is missing": ("import not_there_at_all\n", "No module named 'not_there_at_all'"),
    "several lines": ("raise RuntimeError('one\\ntwo')\n", "RuntimeError: one two"),
    "empty": ("", "has no Participant and no Service in it"),
    "a declaration": (
        WHOLE + "\n@pack_it.compensation\ndef again(placed, packed, session): ...\n",
        "has a compensation already",
    ),
}


@pytest.mark.parametrize(("source", "why"), UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.parametrize("command", ["check", "export", "canvas", "graph"])
def test_a_module_that_cannot_be_used_is_one_line_and_exit_code_2(
    command: str, source: str, why: str
) -> None:
    result = saga(command, written(source, "unusable"))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert "unusable" in result.stderr
    assert why in result.stderr


def test_an_import_that_raises_says_where() -> None:
    result = saga("check", written("import os\n\nos.environ['NOT_SET_HERE']\n", "unusable"))
    assert "unusable.py:3" in result.stderr


def test_what_cannot_be_used_is_json_for_programs() -> None:
    result = saga("check", "--json", "no.such.module")
    assert result.exit_code == 2
    assert "no.such.module" in json.loads(result.stdout)["error"]


@pytest.mark.parametrize(
    "target", ["shopmod:", "shopmod:gone", "shopmod:Placed", ".", "a b", "no.json", "garbage.json"]
)
def test_a_target_that_names_nothing_is_one_line_and_exit_code_2(target: str) -> None:
    written(WHOLE)
    Path("garbage.json").write_text("garbage")
    result = saga("check", target)
    if target == "shopmod:":  # the module itself
        assert result.exit_code == 0
        return
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1


def test_no_target_is_called_wrongly() -> None:
    assert saga("check").exit_code == 2


def test_the_worker_of_a_service_is_no_place_for_its_declarations() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OUTBOX_")}
    ran = subprocess.run(
        [Path(sys.executable).parent / "saga", "check", "examples.order_saga.order.app"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment,
    )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "examples/order_saga/order/app.py:" in ran.stderr
    assert "OUTBOX_BROKER_URL" in ran.stderr


# ---- export and diff ----


def test_export_of_a_module_with_several_asks_for_one() -> None:
    result = saga("export", written(WHOLE))
    assert result.exit_code == 2
    assert "holds several (shop, pack)" in result.stderr


def test_diff_finds_what_open_sagas_would_meet() -> None:
    assert saga("export", written(WHOLE) + ":pack", "-o", "old.json").exit_code == 0
    assert saga("diff", "old.json", "shopmod").exit_code == 0
    renamed = written(WHOLE.replace("pack_it", "wrap_it"), "renamed")
    result = saga("diff", "old.json", renamed)
    assert result.exit_code == 1
    assert "renamed.py:" in result.stdout
    assert "step-renamed" in result.stdout
    document = json.loads(saga("diff", "--json", "old.json", renamed).stdout)
    assert [one["rule"] for one in document["findings"]] == ["step-renamed"]


# ---- canvas and graph ----


def test_the_canvas_is_markdown_where_there_is_no_terminal() -> None:
    lines = saga("canvas", written(WHOLE)).stdout.splitlines()
    assert lines[0] == "| step | participant | trigger | emits | rejects | compensation |"
    assert "| pack_it | pack | shop.placed | shop.packed | - | yes |" in lines
    rows = json.loads(saga("canvas", "--json", "shopmod").stdout)
    assert {row["step"] for row in rows} >= {"pack_it", "shop.placed"}


def test_the_graph_is_mermaid_or_dot() -> None:
    module = written(WHOLE)
    assert saga("graph", module).stdout.startswith("flowchart LR\n")
    assert saga("graph", "--format", "dot", module, "-o", "shop.dot").exit_code == 0
    assert Path("shop.dot").read_text().startswith("digraph saga {")
    arrows = json.loads(saga("graph", "--json", module).stdout)["arrows"]
    assert {"from": "pack.pack_it", "event": "shop.packed", "to": "shop.end"} in arrows


def test_services_named_like_an_end_are_drawn_apart_from_it() -> None:
    source = WHOLE + (
        "\nfrom outbox import Service\n"
        "aborted = Service('aborted', registry=registry)\n"
        "aborted.on(Packed, name='hear')(lambda event, session: None)\n"
        "pack.step(on=Placed, exhausted='abort', name='try', nothing_to_undo='x')(lambda placed, session: None)\n"
    )
    drawn = saga("graph", written(source)).stdout
    assert '(("aborted"))' in drawn
    assert 'n_aborted_2((("aborted")))' in drawn


class NoDot(Exception):
    pass


def _no_dot(_text: str) -> SimpleNamespace:
    def pipe(*, format: str) -> bytes:
        raise NoDot

    return SimpleNamespace(pipe=pipe)


@pytest.mark.parametrize(
    ("library", "advice"),
    [
        (None, "pip install 'outbox-saga[graph]'"),
        (SimpleNamespace(Source=_no_dot, ExecutableNotFound=NoDot), "apt install graphviz"),
    ],
    ids=["package", "program"],
)
def test_an_svg_without_graphviz_says_what_to_install(
    library: ModuleType | None, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", library)
    result = saga("graph", "--format", "svg", written(WHOLE))
    assert result.exit_code == 1
    assert advice in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's program dot is not installed")
def test_an_svg_is_drawn_by_graphviz() -> None:
    pytest.importorskip("graphviz")
    drawn = saga("graph", "--format", "svg", written(WHOLE)).stdout
    assert "<svg" in drawn
    assert "</svg>" in drawn
