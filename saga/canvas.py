"""`saga canvas` and `saga graph`: the choreography as a table that people review, and as a picture.

The table is Richardson's choreography-based saga canvas (Microservices Patterns, 2nd edition, chapter 10) with a column
for compensations. It is made from the declarations, so it cannot drift from the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from saga.choreography import EventRef
from saga.flow import Action, Flow

COLUMNS = ("step", "participant", "trigger", "emits", "rejects", "compensation")


def canvas(flow: Flow) -> list[tuple[str, ...]]:
    """One row for each action, in the order of the flow; the columns are `COLUMNS`."""
    return [
        (
            _title(action),
            action.participant,
            _names(action.on) or "(starts the saga)",
            _names(action.emits) or "-",
            _names(action.rejects) or "-",
            _compensation(action),
        )
        for action in in_flow_order(flow)
    ]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The canvas as a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return "\n".join(lines) + "\n"


def mermaid(flow: Flow, standing: Iterable[str] = ()) -> str:
    """The choreography as a Mermaid flow chart; actions named in *standing* ("participant.action") are lit up."""
    lit = set(standing)
    lines = ["flowchart LR"]
    participants = list(dict.fromkeys(action.participant for action in flow.actions))
    for participant in participants:
        lines.append(f'  subgraph {_id(participant)}["{participant}"]')
        for action in flow.actions:
            if action.participant == participant:
                left, right = (
                    ("([", "])")
                    if action.kind == "start"
                    else ("{{", "}}")
                    if action.kind == "join"
                    else ("[", "]")
                )
                lines.append(f'    {_id(action)}{left}"{_title(action)}"{right}')
        lines.append("  end")
    lines += [
        f"  {_id(source)} -- {name} --> {_id(target)}" for source, name, target in _arrows(flow)
    ]
    for name, subscribers in sorted(flow.subscribers.items()):
        for subscriber in subscribers:
            for producer in flow.producers.get(name, ()):
                lines.append(f"  {_id(producer)} -. {name} .-> {_id(subscriber)}_(({subscriber}))")
    for action in flow.actions:
        for ref in action.rejects:
            lines.append(f"  {_id(action)} -. {ref.name} .-> aborted(((aborted)))")
        if action.completes:
            lines.append(f"  {_id(action)} ==> completed(((completed)))")
    lines += [
        f"  style {_id(action)} fill:#ffd54f" for action in flow.actions if str(action) in lit
    ]
    return "\n".join(lines) + "\n"


def dot(flow: Flow) -> str:
    """The choreography in Graphviz's language."""
    lines = [
        "digraph saga {",
        "  rankdir=LR;",
        '  node [shape=box, style=rounded, fontname="sans-serif"];',
    ]
    for number, participant in enumerate(
        dict.fromkeys(action.participant for action in flow.actions)
    ):
        lines.append(f'  subgraph cluster_{number} {{ label="{participant}"; color=gray;')
        for action in flow.actions:
            if action.participant == participant:
                shape = {"start": "oval", "join": "hexagon", "step": "box"}[action.kind]
                lines.append(f'    {_id(action)} [label="{_title(action)}", shape={shape}];')
        lines.append("  }")
    lines += [
        f'  {_id(source)} -> {_id(target)} [label="{name}"];'
        for source, name, target in _arrows(flow)
    ]
    if any(action.rejects for action in flow.actions):
        lines.append("  aborted [shape=doublecircle];")
    if any(action.completes for action in flow.actions):
        lines.append("  completed [shape=doublecircle];")
    for action in flow.actions:
        lines += [
            f'  {_id(action)} -> aborted [style=dashed, label="{ref.name}"];'
            for ref in action.rejects
        ]
        if action.completes:
            lines.append(f"  {_id(action)} -> completed [style=bold];")
    return "\n".join([*lines, "}"]) + "\n"


def in_flow_order(flow: Flow) -> list[Action]:
    """The actions, starts first, each after what surely comes before it."""
    return sorted(
        flow.actions,
        key=lambda action: (len(flow.before[action]), action.participant, action.place),
    )


def _arrows(flow: Flow) -> list[tuple[Action, str, Action]]:
    return [
        (producer, ref.name, consumer)
        for producer in flow.actions
        for ref in producer.emits
        for consumer in flow.consumers.get(ref.name, ())
    ]


def _title(action: Action) -> str:
    return action.name.removeprefix("start:") + (" (join)" if action.kind == "join" else "")


def _names(refs: Iterable[EventRef]) -> str:
    return ", ".join(ref.name for ref in refs)


def _compensation(action: Action) -> str:
    if action.compensation is not None:
        return "yes"
    return f"none: {action.nothing_to_undo}" if action.nothing_to_undo is not None else "-"


def _id(thing: Action | str) -> str:
    return "".join(char if char.isalnum() else "_" for char in str(thing))
