"""`saga graph`: the choreography as a picture, in Mermaid, in Graphviz's language, or as SVG."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from outbox.errors import ConfigurationError
from saga.canvas import title
from saga.flow import Action, Flow

_MERMAID_BRACKETS: Final = {"start": ("([", "])"), "step": ("[", "]"), "join": ("{{", "}}")}
_DOT_SHAPES: Final = {"start": "oval", "step": "box", "join": "hexagon"}
_LIT: Final = "#ffd54f"

Arrow = tuple[Action, str, Action]


@dataclass(frozen=True)
class _End:
    """How a saga ends; no string, as a service may have that name."""

    name: str

    def __str__(self) -> str:
        return self.name


_ABORTED: Final = _End("aborted")
_COMPLETED: Final = _End("completed")


def arrows(flow: Flow) -> list[Arrow]:
    """Who emits what to whom."""
    return [
        (producer, name, consumer)
        for producer in flow.actions
        for name in producer.answers
        for consumer in flow.consumers.get(name, ())
    ]


def mermaid(flow: Flow, standing: Iterable[str] = ()) -> str:
    """The choreography as a Mermaid flow chart; actions in *standing* ("participant.action") are lit."""
    lit = set(standing)
    ids = _Ids()
    lines = ["flowchart LR"]
    for number, (participant, actions) in enumerate(_by_participant(flow).items(), start=1):
        lines.append(f'  subgraph p{number}["{participant}"]')
        for action in actions:
            left, right = _MERMAID_BRACKETS[action.kind]
            lines.append(f'    {ids(action)}{left}"{title(action)}"{right}')
        lines.append("  end")
    lines += [
        f'  {ids(source)} -- "{name}" --> {ids(target)}' for source, name, target in arrows(flow)
    ]
    for action, name, service in _told(flow):
        lines.append(f'  {ids(action)} -. "{name}" .-> {ids(service)}(("{service}"))')
    for action in flow.actions:
        if action.can_abort:
            why = " or ".join(ref.name for ref in action.rejects) or "gives up"
            lines.append(f'  {ids(action)} -. "{why}" .-> {ids(_ABORTED)}((("aborted")))')
        if action.completes:
            lines.append(f'  {ids(action)} ==> {ids(_COMPLETED)}((("completed")))')
    for deadline in flow.deadlines:
        why = " or ".join(ref.name for ref in deadline.rejects)
        lines.append(f'  {ids(deadline)}[/"{deadline.name} (deadline)"/]')
        lines.append(f'  {ids(deadline)} -. "{why}" .-> {ids(_ABORTED)}((("aborted")))')
    lines += [f"  style {ids(one)} fill:{_LIT}" for one in flow.actions if str(one) in lit]
    return "\n".join(lines) + "\n"


def dot(flow: Flow) -> str:
    """The choreography in Graphviz's language."""
    ids = _Ids()
    lines = ["digraph saga {", "  rankdir=LR;"]
    lines.append('  node [shape=box, style=rounded, fontname="sans-serif"];')
    for number, (participant, actions) in enumerate(_by_participant(flow).items(), start=1):
        lines.append(f"  subgraph cluster_{number} {{ label={_quoted(participant)}; color=gray;")
        for action in actions:
            label, shape = _quoted(title(action)), _DOT_SHAPES[action.kind]
            lines.append(f"    {ids(action)} [label={label}, shape={shape}];")
        lines.append("  }")
    lines += [
        f"  {ids(source)} -> {ids(target)} [label={_quoted(name)}];"
        for source, name, target in arrows(flow)
    ]
    for action, name, service in _told(flow):
        lines.append(f"  {ids(service)} [label={_quoted(service)}, shape=circle];")
        lines.append(f"  {ids(action)} -> {ids(service)} [style=dotted, label={_quoted(name)}];")
    lines += _dot_endings(flow, ids)
    return "\n".join([*lines, "}"]) + "\n"


def svg(flow: Flow) -> bytes:
    """The choreography as SVG. Raises `ConfigurationError` naming what has to be installed for it."""
    try:
        graphviz: Any = import_module("graphviz")
    except ImportError:
        raise ConfigurationError(
            "an SVG needs the Python package graphviz: pip install 'outbox-saga[graph]' "
            "(or take --format mermaid, which needs nothing)"
        ) from None
    try:
        drawn: bytes = graphviz.Source(dot(flow)).pipe(format="svg")
    except graphviz.ExecutableNotFound:
        raise ConfigurationError(
            "an SVG needs Graphviz's program dot on PATH: apt install graphviz, brew install "
            "graphviz (or take --format mermaid, which needs nothing)"
        ) from None
    return drawn


def document(flow: Flow) -> dict[str, Any]:
    """The graph for JSON."""
    return {
        "actions": [
            {
                "name": str(action),
                "kind": action.kind,
                "participant": action.participant,
                "can_abort": action.can_abort,
                "completes": action.completes,
            }
            for action in flow.actions
        ],
        "arrows": [
            {"from": str(source), "event": name, "to": str(target)}
            for source, name, target in arrows(flow)
        ],
        "subscribers": [
            {"from": str(source), "event": name, "to": service}
            for source, name, service in _told(flow)
        ],
    }


def _by_participant(flow: Flow) -> dict[str, list[Action]]:
    found: dict[str, list[Action]] = {}
    for action in flow.actions:
        found.setdefault(action.participant, []).append(action)
    return found


def _told(flow: Flow) -> Iterator[tuple[Action, str, str]]:
    """Who is told what without being part of the saga."""
    for action in flow.actions:
        for name in action.answers:
            for contract in flow.subscribers.get(name, ()):
                yield action, name, contract.name


def _dot_endings(flow: Flow, ids: Callable[[object], str]) -> Iterator[str]:
    aborted, completed = ids(_ABORTED), ids(_COMPLETED)
    if flow.deadlines or any(action.can_abort for action in flow.actions):
        yield f"  {aborted} [label=aborted, shape=doublecircle];"
    if any(action.completes for action in flow.actions):
        yield f"  {completed} [label=completed, shape=doublecircle];"
    for action in flow.actions:
        if action.can_abort:
            why = " or ".join(ref.name for ref in action.rejects) or "gives up"
            yield f"  {ids(action)} -> {aborted} [style=dashed, label={_quoted(why)}];"
        if action.completes:
            yield f"  {ids(action)} -> {completed} [style=bold];"
    for deadline in flow.deadlines:
        why = " or ".join(ref.name for ref in deadline.rejects)
        label = _quoted(f"{deadline.name} (deadline)")
        yield f"  {ids(deadline)} [label={label}, shape=parallelogram];"
        yield f"  {ids(deadline)} -> {aborted} [style=dashed, label={_quoted(why)}];"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _Ids:
    """Names of nodes: letters, digits and _, and never one for two things (a-b is not a_b)."""

    def __init__(self) -> None:
        self._given: dict[object, str] = {}

    def __call__(self, thing: object) -> str:
        if thing not in self._given:
            # The prefix keeps clear of the words that Mermaid and Graphviz keep for themselves.
            wanted = "n_" + "".join(char if char.isalnum() else "_" for char in str(thing))
            taken = self._given.values()
            unique = next(
                name
                for name in (wanted, *(f"{wanted}_{number}" for number in range(2, len(taken) + 3)))
                if name not in taken
            )
            self._given[thing] = unique
        return self._given[thing]
