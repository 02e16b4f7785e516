"""Dropout's definition: Random123's known answers, the keep rule, and that every backend makes exactly this mask."""

import math

import pytest
import torch

import fastattn
from fastattn import philox
from fastattn.testing.opcheck import available_backends

LOW = 0xFFFFFFFF
# kat_vectors of Random123: philox4x32-10 counter, key, result.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((LOW,) * 4, (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def state(seed, offset):
    """(seed, offset) as int64, whatever the bits."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed, offset], dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox.words(state(key[0] | key[1] << 32, counter[0]), tuple(torch.tensor(c) for c in counter[1:]))
    assert tuple(int(word) for word in words) == expected


def test_words_of_a_slow_model():
    """The tensor code against Philox written down with Python's own integers."""

    def model(counter, key):
        c, k = list(counter), list(key)
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & LOW, (a >> 32) ^ c[3] ^ k[1], a & LOW]
            k = [(k[0] + 0x9E3779B9) & LOW, (k[1] + 0xBB67AE85) & LOW]
        return tuple(c)

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        *counter, k0, k1 = torch.randint(0, 2**32, (6,), generator=generator).tolist()
        words = philox.words(state(k0 | k1 << 32, counter[0]), tuple(torch.tensor(c) for c in counter[1:]))
        assert tuple(int(word) for word in words) == model(counter, (k0, k1))


def test_the_mask_reads_words_as_documented():
    """Element (b, h, i, j) is word j % 4 at counter (offset, b * H + h, i, j // 4), kept from floor(p * 2^32) up."""
    given, p, (batch, heads, queries, keys) = state(12345, 6), 0.37, (2, 3, 4, 11)
    mask = philox.keep_mask(given, p, batch, heads, queries, keys)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                for j in range(keys):
                    counter = tuple(torch.tensor(c) for c in (b * heads + h, i, j // 4))
                    word = int(philox.words(given, counter)[j % 4])
                    assert bool(mask[b, h, i, j]) == (word >= math.floor(p * 2**32))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_share_that_is_kept(p):
    mask = philox.keep_mask(philox.fixed(5, torch.device("cpu")), p, 4, 4, 100, 100)
    assert mask.double().mean().item() == pytest.approx(1.0 - p, abs=4 * math.sqrt(p * (1 - p) / mask.numel()))


def test_draws_follow_torchs_generator():
    torch.manual_seed(3)
    first, second = philox.draw(torch.device("cpu")), philox.draw(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, philox.draw(torch.device("cpu"))) and not torch.equal(first, second)


def observed_mask(backend, p, seed, batch, heads, queries, keys, draw=torch.randn, **call):
    """The mask that a backend makes, read off its output: with values = identity the output is the weights."""
    query, key = draw(batch, heads, queries, 8), draw(batch, heads, keys, 8)
    value = torch.eye(keys).expand(batch, heads, keys, keys)
    return (
        fastattn.scaled_dot_product_attention(query, key, value, dropout_p=p, seed=seed, backend=backend, **call) != 0
    )


@pytest.mark.parametrize("backend", available_backends("cpu"))
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 70, 69), (1, 2, 130, 257), (3, 1, 1, 400)], ids=str)
@pytest.mark.parametrize("seed", [0, 2**40 + 17, 2**63 - 1])
def test_every_backend_makes_this_mask(backend, p, shape, seed):
    expected = philox.keep_mask(philox.fixed(seed, torch.device("cpu")), p, *shape)
    assert torch.equal(observed_mask(backend, p, seed, *shape), expected)


@pytest.mark.parametrize("backend", available_backends("cpu"))
def test_the_mask_does_not_depend_on_memory_layout_or_features(backend):
    """Where weights are not 0 for other reasons, the mask is the same for every layout, mask and causality."""
    shape = (2, 3, 66, 70)
    expected = philox.keep_mask(philox.fixed(9, torch.device("cpu")), 0.3, *shape)

    def bshd(b, h, s, e):
        return torch.randn(b, s, h, e).transpose(1, 2)

    assert torch.equal(observed_mask(backend, 0.3, 9, *shape, draw=bshd), expected)
    assert torch.equal(observed_mask(backend, 0.3, 9, *shape, attn_mask=torch.randn(66, 70)), expected)
    causal = observed_mask(backend, 0.3, 9, *shape, is_causal=True)
    assert torch.equal(causal, expected & torch.ones(66, 70, dtype=torch.bool).tril())


@pytest.mark.parametrize("backend", available_backends("cpu"))
def test_the_offset_counts(backend):
    """A drawn (seed, offset), as training has it: the raw op takes any."""
    shape = (1, 2, 20, 33)
    query, key, value = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 33, 8), torch.eye(33).expand(1, 2, 33, 33)
    for given in (state(77, 1), state(77, 2**32 + 1), state(2**63 + 5, 2**62 - 1)):
        forward = getattr(torch.ops.fastattn.attention_forward, backend)
        output, _ = forward(query, key, value.contiguous(), None, given, 0.3, False, False, 0.4)
        assert torch.equal(output != 0, philox.keep_mask(given, 0.4, *shape))


@pytest.mark.parametrize("backend", available_backends("cpu"))
def test_gradients_see_the_same_mask(backend):
    """dV of ones is the column sums of the dropped weights: 0 exactly where a key was dropped by its only query."""
    keep = philox.keep_mask(philox.fixed(1, torch.device("cpu")), 0.5, 2, 2, 1, 100)
    query, key, value = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 100, 8), torch.randn(2, 2, 100, 4)
    value.requires_grad_()
    output = fastattn.scaled_dot_product_attention(query, key, value, dropout_p=0.5, seed=1, backend=backend)
    output.sum().backward()
    assert torch.equal(value.grad[..., 0] != 0, keep[:, :, 0, :])


def test_generator_state_decides_and_advances():
    x = torch.randn(1, 2, 30, 8)

    def run(**call):
        return fastattn.scaled_dot_product_attention(x, x, x, dropout_p=0.5, **call)

    torch.manual_seed(0)
    first, second = run(), run()
    torch.manual_seed(0)
    assert torch.equal(first, run()) and not torch.equal(first, second)
    before = torch.get_rng_state()
    assert torch.equal(run(seed=4), run(seed=4))
    assert torch.equal(before, torch.get_rng_state()), "a fixed seed must leave torch's generator alone"


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", available_backends("cpu"))
def test_rows_are_dropped_as_documented(backend, dtype, p):
    """add_layer_norm's and add_rms_norm's sums of ones and zeros are the mask; the input's gradient has it, too."""
    x, zeros = torch.ones(11, 1301, dtype=dtype, requires_grad=True), torch.zeros(11, 1301, dtype=dtype)
    expected = philox.row_mask(philox.fixed(99, torch.device("cpu")), p, 11, 1301)
    assert torch.equal(expected, philox.keep_mask(philox.fixed(99, torch.device("cpu")), p, 1, 1, 11, 1301)[0, 0])
    for function in (fastattn.add_layer_norm, fastattn.add_rms_norm):
        _, total = function(x, zeros, (1301,), dropout_p=p, seed=99, backend=backend)
        assert torch.equal(total != 0, expected)
        (gradient,) = torch.autograd.grad(total.sum(), x)
        assert torch.equal(gradient != 0, expected)


def test_a_seed_drawn_from_torch_drops_the_same_elements_again():
    x, zeros = torch.ones(7, 65), torch.zeros(7, 65)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append([fastattn.add_layer_norm(x, zeros, (65,), dropout_p=0.5)[1] for _ in range(2)])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[0][1])
