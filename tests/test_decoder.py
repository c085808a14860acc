"""The decoder: how tokens are drawn, and rows that come and go without a trace in each other's texts."""

import math

import pytest
import torch
from test_compiled import CPU, QWEN3, full_forward, has_compiler, make

from quartz import compiled
from quartz.decoder import READ_COST, Decoder, Drawn, Reading, Sampling, complete, draw
from quartz.engine import Engine

PROMPTS = [[1, 2, 3], [4], [5] * 40, [7, 8] * 9, [3]]  # of which one is longer than block_size, 32
SAMPLINGS = [Sampling(top_k=9), Sampling(temperature=0), Sampling(top_p=0.8), Sampling(min_p=0.1, temperature=2.0)]
SAMPLINGS.append(Sampling(repetition_penalty=1.3))


def finish(decoder: Decoder, keep: dict[int, list] | None = None) -> dict[int, list[tuple[int, torch.Tensor]]]:
    """Steps until nothing runs: (token, logits) of each row."""
    found = {} if keep is None else keep
    while drawn := decoder.step():
        note(found, drawn)
    return found


def note(found: dict[int, list], drawn: list[Drawn]) -> None:
    for its in drawn:
        found.setdefault(its.row, []).append((its.token, its.logits.clone()))


def are_equal(one: list[tuple[int, torch.Tensor]], other: list[tuple[int, torch.Tensor]]) -> bool:
    """Tokens and the bits of the logits."""
    return len(one) == len(other) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


def alone(engine, rows: int, prompt: list[int], seed: int, sampling: Sampling, count: int, chunk: int = 5) -> list:
    decoder = Decoder(engine, rows, 200, chunk=chunk)
    (row,) = decoder.admit(prompt, [seed], count, sampling)
    return finish(decoder)[row]


SHAPES = [
    {},
    QWEN3,
    {"n_head": 1},
    {"n_embd": 36, "n_head": 3},
    {"n_embd": 30, "n_head": 3},
    {"n_embd": 96, "n_head": 4, "vocab_size": 33},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.alone)])
def test_a_rows_bits_are_those_of_the_row_alone(changes, threads):
    """Text and logits, past block_size, whatever number of rows there is, whichever row it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine = Engine(make(**changes))
        decoder = Decoder(engine, 5, 200, chunk=5)
        for seed, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
            decoder.admit(prompt, [seed], 60, sampling)
        together = finish(decoder)
        for rows in (2, 8):
            for seed, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True)):
                assert are_equal(together[seed], alone(engine, rows, prompt, seed, sampling, 60)), (rows, seed)
        # All of one length, which takes another way through memory; in the last of the rows
        decoder = Decoder(engine, 7, 200, chunk=5)
        rows = decoder.admit(PROMPTS[0], [9, 9, 9, 9, 9, 9, 0], 60, SAMPLINGS[0])
        assert are_equal(finish(decoder)[rows[-1]], together[0])
    finally:
        torch.set_num_threads(before)


def test_a_decoder_of_a_single_row_writes_the_same_text():
    """By products that are quicker and round otherwise."""
    engine, how = Engine(make()), Sampling(top_k=9)
    assert complete(engine, PROMPTS, 60, how) == [complete(engine, [p], 60, how, [n])[0] for n, p in enumerate(PROMPTS)]


def test_the_bits_are_the_same_at_a_real_size():
    """As GPT-2's heads and width, with contexts on both sides of what an attention kernel takes in one block."""
    engine = Engine(make(n_layer=1, n_head=12, n_embd=768, block_size=640, vocab_size=500))
    prompts = [list(range(n)) for n in (500, 3, 130)]
    decoder = Decoder(engine, 3, 640)
    for seed, prompt in enumerate(prompts):
        decoder.admit(prompt, [seed], 30)
    together = finish(decoder)
    for seed, prompt in enumerate(prompts):
        decoder = Decoder(engine, 2, 640)
        decoder.admit(prompt, [seed], 30)
        assert are_equal(finish(decoder)[0], together[seed])


def come_and_go(engine, rows: int) -> None:
    """Rows are admitted, released and admitted again while others run; each text is that of the row alone."""
    decoder, found, of_row = Decoder(engine, rows, 200, chunk=5), {}, {}

    def admit(n: int, seed: int) -> None:
        (row,) = decoder.admit(PROMPTS[n], [seed], 40, SAMPLINGS[n])
        found.pop(row, None)
        of_row[row] = (n, seed)

    admit(0, 1), admit(2, 2)
    for turn in range(30):
        note(found, decoder.step(chunks=1))
        if turn == 3:
            decoder.release(0)
            admit(3, 3)  # in the same row
        if turn == 9:
            admit(1, 4)
    finish(decoder, found)
    assert sorted(of_row) == [0, 1, 2] and decoder.free() == list(range(rows))
    for row, (n, seed) in of_row.items():
        assert are_equal(found[row], alone(engine, rows, PROMPTS[n], seed, SAMPLINGS[n], 40)), row


def test_rows_come_and_go():
    come_and_go(Engine(make()), 4)


@pytest.mark.skipif(not has_compiler(), reason="no C compiler")
@pytest.mark.parametrize(("changes", "quantize"), [({}, False), (QWEN3, True)], ids=["float32", "int8 qwen3"])
def test_rows_of_a_compiled_step_come_and_go(compiled_folder, changes, quantize):
    engine = compiled.prepare(make(**changes), CPU, torch.float32, quantize, 3, 10**9, True)
    assert isinstance(engine, compiled.CompiledStep)
    come_and_go(engine, 3)


def test_many_rows_in_bfloat16_are_the_same_texts_too():
    engine = Engine(make(), CPU, torch.bfloat16, torch.bfloat16)
    decoder = Decoder(engine, 5, 200, chunk=5)
    for seed, prompt in enumerate(PROMPTS):
        decoder.admit(prompt, [seed], 60, Sampling(top_k=20))
    for seed, text in finish(decoder).items():
        assert are_equal(text, alone(engine, 2, PROMPTS[seed], seed, Sampling(top_k=20), 60))


@pytest.mark.parametrize("chunk", [1, 3, 16, 100])
def test_a_prompt_in_chunks_gives_the_full_forward_pass(chunk):
    model, prompt = make(**QWEN3), list(range(20))
    decoder = Decoder(Engine(model), 2, 200, chunk=chunk)
    decoder.admit(prompt, [0], 12, Sampling(temperature=0))
    found = torch.stack([logits for _, logits in finish(decoder)[0]])
    torch.testing.assert_close(found, full_forward(model, prompt, 12), atol=2e-4, rtol=0)


def test_greedy_texts_past_the_context_are_those_of_the_plain_model():
    model = make()
    for prompt in PROMPTS:
        expected = model.generate(torch.tensor([prompt]), 70, temperature=0)[0, len(prompt) :]
        assert complete(Engine(model), [prompt], 70, Sampling(temperature=0))[0] == expected.tolist()


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_shortest_contexts_decode_too(block_size):
    model, prompt = make(block_size=block_size), [1, 2, 3, 4]
    expected = model.generate(torch.tensor([prompt]), 9, temperature=0)[0, 4:]
    assert complete(Engine(model), [prompt, prompt], 9, Sampling(temperature=0)) == [expected.tolist()] * 2


def test_one_chunk_is_read_between_two_steps(monkeypatch):
    engine, read = Engine(make()), []
    plain = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda ids, *a: read.append(len(ids)) or plain(ids, *a))
    decoder = Decoder(engine, 2, 200, chunk=8)
    decoder.admit([1], [0], 20)
    assert len(decoder.step(chunks=1)) == 1
    decoder.admit([2] * 20, [0], 20)
    assert [len(decoder.step(chunks=1)) for _ in range(3)] == [1, 1, 2] and read == [1, 8, 8, 4]
    assert len(decoder.step(chunks=0)) == 2


def test_a_prompt_is_read_once_for_all_of_its_rows(monkeypatch):
    engine, read = Engine(make()), []
    plain = engine.prefill
    monkeypatch.setattr(
        engine, "prefill", lambda ids, cache, row, *rest: read.append(row) or plain(ids, cache, row, *rest)
    )
    decoder = Decoder(engine, 4, 200)
    assert decoder.admit([1, 2], [5, 6, 7], 9) == [0, 1, 2]
    found = finish(decoder)
    assert read == [0]
    for row, seed in enumerate((5, 6, 7)):
        assert are_equal(found[row], alone(engine, 2, [1, 2], seed, Sampling(), 9))


def test_a_chunks_time_is_enough_for_several_short_prompts():
    """Each costs its tokens, and the weights that are read for it."""
    engine = Engine(make())
    decoder, ids = Decoder(engine, 10, 200), list(range(8))
    for seed in range(10):
        decoder.admit([*ids, seed], [seed], 3, SAMPLINGS[0])
    fit = (256 + READ_COST) // (9 + READ_COST)
    found: dict[int, list] = {}
    note(found, decoder.step(chunks=1))
    assert sorted(found) == list(range(fit)) and 1 < fit < 10
    finish(decoder, found)
    for seed in range(10):
        assert are_equal(found[seed], alone(engine, 2, [*ids, seed], seed, SAMPLINGS[0], 3, chunk=256))


def test_all_logits_of_a_prompt_are_those_of_the_full_forward_pass():
    """Of each token, a few at a time, without ids that are beyond the vocabulary."""
    model, ids, seen = make(**QWEN3, block_size=200), [(5 * n + n * n) % 61 for n in range(150)], []
    reading = Reading()
    reading.see = seen.append
    decoder = Decoder(Engine(model), 2, 200, vocab_size=50, chunk=100)
    decoder.admit(ids, [0], 1, reading=reading)
    decoder.step()
    assert [len(few) for few in seen] == [64, 36, 50]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), torch.tensor([ids]))[0][0, :, :50]
    torch.testing.assert_close(torch.cat(seen), expected, atol=2e-4, rtol=0)


def test_the_row_that_reads_for_others_may_be_released():
    engine = Engine(make())
    decoder = Decoder(engine, 3, 200, chunk=5)
    decoder.admit(PROMPTS[3], [5, 6, 7], 9)
    decoder.step(chunks=2)
    decoder.release(2)  # which reads nothing
    decoder.release(0)
    (row,) = decoder.admit([9], [1], 3)
    assert row == 0
    found = finish(decoder)
    assert are_equal(found[1], alone(engine, 2, PROMPTS[3], 6, Sampling(), 9)) and len(found[0]) == 3


def test_a_row_ends_with_its_stop_or_at_its_length():
    engine = Engine(make())
    (text,) = complete(engine, [[1]], 30, seeds=[3])
    decoder = Decoder(engine, 2, 200, ahead=4)
    decoder.admit([1], [3], 30, stop_ids=[text[5], text[9]])
    decoder.admit([1], [3], 7)
    drawn = []
    while found := decoder.step():
        drawn += found
    stop = min(text.index(text[5]), text.index(text[9]))
    for row, (length, end) in enumerate([(stop + 1, "stop"), (7, "length")]):
        its = [one for one in drawn if one.row == row]
        assert [one.token for one in its] == text[:length]
        assert [one.end for one in its] == [None] * (length - 1) + [end]
    assert decoder.free() == [0, 1]


def test_steps_ahead_change_nothing():
    engine = Engine(make())
    one, many = (complete(engine, PROMPTS, 60, Sampling(top_k=9, repetition_penalty=1.2), ahead=n) for n in (1, 16))
    assert one == many


def test_log_probabilities_are_the_models_whatever_the_sampling():
    model = make()
    decoder = Decoder(Engine(model), 1, 200, logprobs=True)
    decoder.admit([5, 6], [0], 2, Sampling(temperature=0.0, top_k=3, repetition_penalty=9.0))
    (first,), (second,) = decoder.step(), decoder.step()
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6]]))[0][0, -1]
        after = model(torch.tensor([[5, 6, first.token]]))[0][0, -1]
    torch.testing.assert_close(first.logits, expected, atol=1e-4, rtol=0)
    for drawn, logits in ((first, expected), (second, after)):
        assert drawn.logprob == pytest.approx(logits.log_softmax(-1)[drawn.token].item(), abs=1e-4)


def test_texts_leave_torchs_generator_alone():
    engine = Engine(make())
    before = torch.get_rng_state()
    complete(engine, [[1]], 20)
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_rows_of_the_vocabulary_are_never_drawn():
    model = make()
    with torch.no_grad():
        model.lm_head.weight[50:] = model.lm_head.weight[:11] * 1.5
    prompts, how = [[n] for n in range(20)], Sampling(temperature=2.0)
    assert max(max(text) for text in complete(Engine(model), prompts, 40, how)) >= 50
    assert max(max(text) for text in complete(Engine(model), prompts, 40, how, vocab_size=50)) < 50


def test_a_strong_repetition_penalty_repeats_nothing():
    how = Sampling(temperature=0, repetition_penalty=1e6)
    for prompt, text in zip(PROMPTS, complete(Engine(make()), PROMPTS, 15, how), strict=True):
        assert len(set(text)) == 15 and not set(text) & set(prompt)


@pytest.mark.parametrize(
    "keywords",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_sampling_out_of_range_is_refused(keywords):
    decoder = Decoder(Engine(make()), 1, 9)
    with pytest.raises(ValueError, match=next(iter(keywords))):
        decoder.admit([1], [0], 1, Sampling(**keywords))
    assert decoder.free() == [0]


def test_what_cannot_be_admitted_is_refused():
    decoder = Decoder(Engine(make()), 2, 9)
    for prompt, seeds, count, words in (
        ([], [0], 1, "prompt"),
        ([1], [0], 0, "max_new_tokens"),
        ([1], [], 1, "0 seeds"),
    ):
        with pytest.raises(ValueError, match=words):
            decoder.admit(prompt, seeds, count)
    with pytest.raises(ValueError, match="3 seeds for 2 free rows"):
        decoder.admit([1], [1, 2, 3], 1)
    with pytest.raises(ValueError, match="4 \\+ 6 tokens do not fit in rows of 9"):
        decoder.admit([1] * 4, [1], 6)
    assert decoder.free() == [0, 1] and decoder.step() == []


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -math.inf]])
    uniform = (torch.arange(20000) + 0.5) / 20000

    def shares(**settings):
        return torch.bincount(draw(logits.expand(20000, 5), Sampling(**settings), uniform), minlength=5) / 20000

    def kept(*ids):
        return torch.full((5,), -math.inf).index_copy(0, torch.tensor(ids), logits[0, list(ids)]).softmax(0)

    expected = {  # the probabilities are 0.24, 0.09, 0.03, 0.64, 0
        (): kept(0, 1, 2, 3),
        ("top_k", 2): kept(0, 3),
        ("top_p", 0.6): kept(3),
        ("top_p", 0.7): kept(3, 0),
        ("top_p", 0.95): kept(3, 0, 1),
        ("top_p", 1e-9): kept(3),
        ("min_p", 0.1): kept(3, 0, 1),
        ("min_p", 0.2): kept(3, 0),
        ("min_p", 1.0): kept(3),
    }
    for setting, shares_expected in expected.items():
        found = shares(**dict([setting] if setting else []))
        torch.testing.assert_close(found, shares_expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5, top_k=0), (logits[0] / 0.5).softmax(0), atol=1e-3, rtol=0)
    assert all(shares(temperature=temperature)[3] == 1 for temperature in (1e-30, 1e-50, 0))
    assert all(abs(share - 0.25) < 1e-3 for share in shares(temperature=1e300)[:4])
    # In their order: of the two that top_k leaves, the likelier has 0.73 of the mass.
    assert shares(top_k=2, top_p=0.7)[3] == 1
    edge = torch.tensor([0.0, 1 - 2**-24])
    assert draw(logits.expand(2, 5), Sampling(top_k=99), edge).tolist() == [0, 3]


@pytest.mark.parametrize("setting", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}], ids=str)
def test_what_ties_with_the_last_that_is_kept_is_kept_too(setting):
    logits = torch.tensor([2.0, 1.0, 2.0, 2.0, 1.0]).expand(3000, 5)
    drawn = draw(logits, Sampling(**setting), (torch.arange(3000) + 0.5) / 3000)
    assert torch.bincount(drawn, minlength=5).tolist() == [1000, 0, 1000, 1000, 0]


def test_the_repetition_penalty_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    logits, text = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), torch.tensor([[3, 3, 9], [1, 2, 9]])
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(text, logits)
    seen = torch.zeros(2, 50, dtype=torch.bool).scatter(1, text, True)
    uniform = torch.rand(2, generator=torch.Generator().manual_seed(1))
    for u in (uniform, 1 - uniform, uniform / 2):
        expected = draw(theirs, Sampling(), u)
        assert torch.equal(draw(logits, Sampling(repetition_penalty=1.7), u, seen), expected)
