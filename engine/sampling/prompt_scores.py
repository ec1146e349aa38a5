"""Scores of a prompt's tokens: log-probs, likely tokens, chosen ones and draws."""

from __future__ import annotations

import numpy as np

from ...model.prefill import PromptScores as Computed
from ...model.token_sampling import float32_temperature, uniforms
from .. import messages

_DRAWS = 1 << 63  # replaces a sample's index, so that no sample has the same random numbers


class TopTable:
    """Top-k rows of one prompt or sample. Rows that were not set have empty cells."""

    def __init__(self, k: int, rows: int):
        self._tokens = np.zeros((rows, k), np.int32)
        self._logprobs = np.full((rows, k), messages.EMPTY_LOGPROB, np.float32)

    def set(self, first_row: int, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Set rows from `first_row` on, taking the first k columns."""
        k = min(self._tokens.shape[1], tokens.shape[1])
        self._tokens[first_row : first_row + len(tokens), :k] = tokens[:, :k]
        self._logprobs[first_row : first_row + len(tokens), :k] = logprobs[:, :k]

    def message(self) -> messages.TopK:
        length, k = self._tokens.shape
        return messages.TopK(
            token_ids=self._tokens.tobytes(), logprobs=self._logprobs.tobytes(), k=k, length=length
        )


class Targets:
    """Tokens chosen by the client, any number per prompt position, and their log-probs as they are computed.

    Row i of the request's table is about prompt position i + 1.
    """

    def __init__(self, cells: messages.PromptCells):
        rows, columns = cells.shape
        tokens = np.frombuffer(cells.values, np.int32)
        if cells.crow_indices is None:
            begins = np.arange(rows + 1) * columns
        else:
            begins = np.frombuffer(cells.crow_indices, np.int64)
        self._cells = cells
        self._logprobs = np.zeros(len(tokens), np.float32)
        self._asked = np.flatnonzero(tokens >= 0)  # the cells to score, by row
        self._tokens = tokens[self._asked]
        self._begins = np.searchsorted(self._asked, begins)

    @property
    def first_position(self) -> int:
        """The first prompt position with a token to score."""
        return int(np.flatnonzero(np.diff(self._begins))[0]) + 1

    def width(self, first_position: int, count: int) -> int:
        """Return the most tokens to score at one of these positions."""
        return int(np.diff(self._begins[first_position - 1 : first_position + count]).max(initial=0))

    def _places(self, first_position: int, count: int) -> tuple[slice, np.ndarray, np.ndarray]:
        """Return the requested cells of these positions, with each one's row (from the first) and place in
        its row."""
        begins = self._begins[first_position - 1 : first_position + count]
        row = np.repeat(np.arange(count), np.diff(begins))
        return slice(begins[0], begins[-1]), row, np.arange(begins[0], begins[-1]) - begins[row]

    def write_to(self, table: np.ndarray, first_position: int) -> None:
        """Put the tokens of the following positions into the rows of `table`."""
        cells, row, place = self._places(first_position, len(table))
        table[row, place] = self._tokens[cells]

    def set(self, first_position: int, logprobs: np.ndarray) -> None:
        """Store the log-probs of `write_to`'s tokens."""
        cells, row, place = self._places(first_position, len(logprobs))
        self._logprobs[self._asked[cells]] = logprobs[row, place]

    def message(self) -> messages.PromptCells:
        cells = self._cells
        return messages.PromptCells(
            cells.shape, self._logprobs.tobytes(), cells.crow_indices, cells.col_indices
        )


class PromptScores:
    """The scores that one request wants, and those computed so far; `seed` is for its draws."""

    def __init__(self, request: messages.Sample, prompt: np.ndarray, seed: int):
        length, k = len(prompt), request.topk_prompt_logprobs
        self._prompt, self._seed = prompt, seed
        self._temperature = float32_temperature(request.params.temperature)
        self._next_from = 1
        if request.prompt_logprobs_last_n is not None:
            self._next_from = length - request.prompt_logprobs_last_n
        self._logprobs = np.full(length, np.nan, np.float32) if request.prompt_logprobs else None
        self._top = TopTable(k, length) if k else None
        self._targets = Targets(request.prompt_targets) if request.prompt_targets is not None else None
        self._draws = request.prompt_alternatives
        self._drawn = np.zeros((length - 1, self._draws), np.int32)
        self._drawn_logprobs = np.zeros((length - 1, self._draws), np.float32)
        firsts = [self._next_from] if request.prompt_logprobs or k else []
        firsts += [1] if self._draws else []
        firsts += [self._targets.first_position] if self._targets else []
        self.first_position = min(firsts, default=length)
        """The first prompt position to score: what comes two or more before it may come from a cache."""

    @property
    def is_asked(self) -> bool:
        return self.first_position < len(self._prompt)

    @property
    def wants_top(self) -> bool:
        return self._top is not None

    @property
    def draws(self) -> int:
        """The number of tokens to draw at each position."""
        return self._draws

    def width(self, first_position: int, count: int) -> int:
        """The number of tokens to score per position: the prompt's own and those of `Targets`."""
        return 1 + (self._targets.width(first_position, count) if self._targets else 0)

    def write_to(
        self, tokens: np.ndarray, u: np.ndarray, temperature: np.ndarray, first_position: int
    ) -> None:
        """Fill the rows of `prefill.score`'s arguments for the following positions."""
        count = len(tokens)
        tokens[:, 0] = self._prompt[first_position : first_position + count]
        if self._targets is not None:
            self._targets.write_to(tokens[:, 1:], first_position)
        temperature[:] = self._temperature
        if k := self._draws:
            random = uniforms(self._seed, _DRAWS, first_position * k, count * k)
            u[:, :k] = random.reshape(count, k, 2)

    def set(self, first_position: int, computed: Computed) -> bool:
        """Store the scores of the following positions; return False if a log-prob is not finite."""
        count = len(computed.logprobs)
        skipped = min(max(self._next_from - first_position, 0), count)
        first, rows = first_position + skipped, slice(skipped, count)
        if self._logprobs is not None:
            self._logprobs[first : first_position + count] = computed.logprobs[rows, 0]
        if self._top is not None:
            self._top.set(first, computed.top_tokens[rows], computed.top_logprobs[rows])
        if self._targets is not None:
            self._targets.set(first_position, computed.logprobs[:, 1:])
        if k := self._draws:
            rows = slice(first_position - 1, first_position - 1 + count)
            self._drawn[rows] = computed.drawn[:, :k]
            self._drawn_logprobs[rows] = computed.drawn_logprobs[:, :k]
        return bool(np.isfinite(computed.logprobs[:, 0]).all())

    def fields(self) -> dict:
        """Return the requested fields of `messages.SampleOutput`."""
        return {
            "prompt_logprobs": None if self._logprobs is None else self._logprobs.tobytes(),
            "topk_prompt_logprobs": None if self._top is None else self._top.message(),
            "prompt_targets": None if self._targets is None else self._targets.message(),
            "prompt_alternatives": messages.PromptAlternatives(
                self._drawn.tobytes(), self._drawn_logprobs.tobytes(), self._draws
            )
            if self._draws
            else None,
        }
