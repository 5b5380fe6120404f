import numpy as np

from cycleqd_jax.models.packing import pack, packed_tokens


def ancestors(end: np.ndarray, slot: int) -> list[int]:
    return [j for j in range(slot + 1) if slot < end[j]]


def test_a_row_holds_a_forest_and_every_token_sees_its_own_text() -> None:
    question, other = [5, 6, 7], [8, 9]
    pairs = [(question, [1, 2]), (question, [1, 3]), (question, [4]), (other, [2]), (question, [4])]
    (batch,) = pack(pairs, longest=64, budget=1024)
    tokens, end = batch.packed.tokens[0], batch.packed.end[0]
    # The question once, the continuation's first token once, the last tokens not at all.
    assert tokens[:6].tolist() == [5, 6, 7, 1, 8, 9]
    assert batch.packed.positions[0, :6].tolist() == [0, 1, 2, 3, 0, 1]
    assert not tokens[6:].any()
    assert packed_tokens([batch]) == 256
    scored: dict[int, list[tuple[list[int], int]]] = {}
    for slot, target, owner in zip(
        batch.packed.slot[0], batch.packed.target[0], batch.owner[0], strict=True
    ):
        if owner >= 0:
            seen = [int(tokens[j]) for j in ancestors(end, int(slot))]
            scored.setdefault(int(owner), []).append((seen, int(target)))
    for i, (context, continuation) in enumerate(pairs):
        text = [*context, *continuation]
        expected = [(text[:n], text[n]) for n in range(len(context), len(text))]
        assert sorted(scored[i]) == expected


def test_texts_go_to_rows_that_hold_them_and_few_tokens_are_wasted() -> None:
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(10, 120, 300), *rng.integers(300, 1000, 20), 2048]
    pairs = [(rng.integers(0, 1000, n).tolist(), [1]) for n in lengths]
    batches = pack(pairs, longest=2048, budget=2048)
    owners = np.concatenate([batch.owner.ravel() for batch in batches])
    assert sorted(owners[owners >= 0]) == list(range(len(pairs)))
    assert packed_tokens(batches) < 1.35 * sum(lengths)
    # A shape is compiled: one for each width.
    assert len({(b.packed.tokens.shape, b.owner.shape) for b in batches}) <= 4
    assert max(b.packed.tokens.size for b in batches) <= 2048
    for batch in batches:
        assert (batch.packed.end > np.arange(batch.packed.end.shape[1])).all()
