"""The family tree of one model, to print."""

from collections.abc import Sequence

from rich.text import Text
from rich.tree import Tree

from cycleqd_jax.runs.records.lineage import Birth, FamilyTree


def draw_pedigree(family: FamilyTree, id: int, tasks: Sequence[str], depth: int = 6) -> Tree:
    """A model, its parents, theirs, and so on.

    An ancestor that is met again is shown without its own ancestors, as is one that lies deeper
    than asked for; the line says so.

    Args:
        family: all births of the run.
        id: the model at the top.
        tasks: the skills in the order of the archives.
        depth: generations of ancestors that are shown.

    Raises:
        ValueError: no model has the id, or the log is damaged.
    """
    top = family.birth(id)
    title = _describe(top, tasks)
    root = Tree(title)
    shown = {id}
    waiting = [(top, title, root, 0)]
    while waiting:
        birth, line, node, level = waiting.pop(0)
        parents = family.parents(birth)
        if len(parents) == 2 and parents[0] is parents[1]:
            line.append("  both parents:", style="dim")
            parents = parents[:1]
        for parent in parents:
            label = _describe(parent, tasks)
            branch = node.add(label)
            if not parent.parents:
                continue
            if parent.id in shown:
                label.append("  (shown elsewhere)", style="dim")
            elif level + 1 >= depth:
                count = len(family.ancestors(parent.id))
                label.append(f"  ({count} ancestors not shown)", style="dim")
            else:
                shown.add(parent.id)
                waiting.append((parent, label, branch, level + 1))
    return root


def _describe(birth: Birth, tasks: Sequence[str]) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"#{birth.id} ", style="bold")
    if birth.archive is None:
        text.append(f"expert {birth.operator.get('expert', '?')} ", style="green")
    else:
        text.append(f"generation {birth.generation}, archive {tasks[birth.archive]} ", "cyan")
    known = [birth.scores[task] for task in tasks if task in birth.scores]
    text.append(" ".join(f"{score:.2f}" for score in known))
    if known:
        text.append(f" mean {sum(known) / len(known):.3f}")
    text.append(_how(birth), style="dim")
    return text


def _how(birth: Birth) -> str:
    operator = birth.operator
    if "weights" in operator:
        first, second = operator["weights"]
        return f"  = {first:.2f} a + {second:.2f} b along {operator.get('expert', '?')}"
    if "place" in operator:
        return f"  = {operator['place']:.2f} of the arc a b along {operator.get('expert', '?')}"
    return ""
